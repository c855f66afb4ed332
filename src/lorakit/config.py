"""Strict frozen dataclasses that come from and go to dicts and YAML. Knows no particular config.

A config class derives from `Config`. Its fields are checked against their type hints when it is made, from Python or
from a file alike: an unknown key is an error with the nearest name, a wrong type an error with the field's name; all
problems are told at once. Other libraries' spellings of names and values are taken where they mean the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import pydantic
import yaml

from lorakit.errors import ConfigError, nearest

# ---------------------------------------------------------------- types of fields


def _place_text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


Place = Annotated[str, pydantic.BeforeValidator(_place_text)]
"""A file, folder or name as text; a `Path` is taken too."""


def dtype_name(value: Any) -> Any:
    """Our name of a dtype: fp32, bf16 or fp16 for float32, torch.bfloat16, half and the like. What is none stays.

    Args:
        value: a string, or a torch.dtype.
    """
    return _DTYPE_NAMES.get(str(value).removeprefix("torch."), value)


_DTYPE_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "half": "fp16"}

DtypeName = Annotated[Literal["auto", "fp32", "bf16", "fp16"], pydantic.BeforeValidator(dtype_name)]
"""A dtype by our name, or auto; every spelling that `dtype_name` knows is taken."""


# ---------------------------------------------------------------- configs


@functools.cache
def _validators(cls: type) -> dict[str, pydantic.TypeAdapter[Any]]:
    """One pydantic validator per field."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: _validator(hints[f.name]) for f in dataclasses.fields(cls) if f.init}


def _validator(hint: Any) -> pydantic.TypeAdapter[Any]:
    """Strict: "16" is no int, NaN no number. A nested Config has checked itself: only its class counts."""
    if isinstance(hint, type) and issubclass(hint, Config):
        return pydantic.TypeAdapter(pydantic.InstanceOf[hint])
    return pydantic.TypeAdapter(hint, config=pydantic.ConfigDict(allow_inf_nan=False))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Base of every config.

    Subclasses: `@dataclass(frozen=True, kw_only=True)`, and override `problems()` for what types cannot say.
    """

    # What from_dict accepts besides the fields' names: alias -> field; switch (true or false) -> (field, its value if
    # true, its value if false). And what it refuses with a word: setting of another library -> what to do instead.
    aliases: ClassVar[Mapping[str, str]] = {}
    switches: ClassVar[Mapping[str, tuple[str, Any, Any]]] = {}
    advice: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        checked, found = self._check_types({f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init})
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        found = found or self.problems()
        if found:
            raise ConfigError.listing(type(self).__name__, found)

    @classmethod
    def _check_types(cls, values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Values as their hints want them, and a sentence for each that does not fit its hint."""
        checked: dict[str, Any] = {}
        found: list[str] = []
        hints = typing.get_type_hints(cls)
        validators = _validators(cls)  # type: ignore[arg-type]  # mypy takes the instances' __hash__ for the class's
        for name, value in values.items():
            hint, value = hints[name], _ordered(value)
            try:
                if isinstance(hint, type) and issubclass(hint, Config) and isinstance(value, Mapping):
                    value = hint.from_dict(cls._over_default(name, hint, value))
                checked[name] = validators[name].validate_python(value, strict=True)
            except pydantic.ValidationError as error:
                found.append(f"{name}: {error.errors()[0]['msg']} (got {value!r})")
            except ConfigError as error:
                found += [f"{name}: {problem}" for problem in error.problems]
        return checked, found

    @classmethod
    def as_taken(cls, name: str, value: Any) -> Any:
        """A value as field `name` takes it (fp32 for float32); unchanged if the field refuses it."""
        return cls._check_types({name: value})[0].get(name, value)

    def problems(self) -> list[str]:
        """What is wrong beyond types: ranges, settings at odds with each other. One sentence each."""
        return []

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "settings") -> Self:
        """Build from a mapping (nested configs as mappings), refusing unknown keys.

        A nested mapping changes the nested config's default here; what it does not name stays as that default has it.

        Args:
            values: field name (or alias, or switch) -> value.
            where: what to call the source in errors, e.g. "run.yaml".

        Raises:
            ConfigError: unknown key (with the nearest known name), a field given twice, or a bad value.
        """
        fields = {f.name for f in dataclasses.fields(cls) if f.init}
        given: dict[str, Any] = {}
        found = []
        for key, value in values.items():
            name = str(key).replace("-", "_")
            if name in cls.switches:
                field, if_true, if_false = cls.switches[name]
                if not isinstance(value, bool):
                    found.append(f"{key}: expected true or false (got {value!r})")
                name, value = field, if_true if value else if_false
            name = cls.aliases.get(name, name)
            if name not in fields:
                found.append(unknown_key(key, fields, {*cls.aliases, *cls.switches}, cls.advice))
            elif name in given:
                found.append(f"{key!r} sets {name!r} a second time")
            else:
                given[name] = value
        required = [
            f.name
            for f in dataclasses.fields(cls)
            if f.init and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        found += [f"{name!r} is required" for name in required if name not in given]
        if found:
            raise ConfigError.listing(where, found + cls._check_types(given)[1])
        try:
            return cls(**given)
        except ConfigError as error:
            raise ConfigError.listing(where, error.problems) from None

    @classmethod
    def _over_default(cls, name: str, nested: type[Config], values: Mapping[str, Any]) -> dict[str, Any]:
        """`values` over those settings in which the default of field `name` differs from `nested`'s own defaults."""
        (field,) = (f for f in dataclasses.fields(cls) if f.name == name)
        if field.default_factory is dataclasses.MISSING:
            return dict(values)
        default, plain = field.default_factory().to_dict(), nested().to_dict()
        other = {**nested.aliases, **{switch: field for switch, (field, _, _) in nested.switches.items()}}
        named = {other.get(key, key) for key in (str(key).replace("-", "_") for key in values)}
        return {k: v for k, v in default.items() if v != plain[k] and k not in named} | dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings, numbers, as YAML and JSON hold them. `from_dict` of it gives an equal config."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self) if f.init}

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read a YAML file as `from_dict` would."""
        return cls.from_dict(read_yaml(path), where=str(path))

    def to_yaml(self) -> str:
        """The fully resolved config as YAML text, fields in their declared order."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=120)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)


def unknown_key(
    key: object, known: Iterable[str], spellings: Iterable[str] = (), advice: Mapping[str, str] | None = None
) -> str:
    """`unknown key 'lerning_rate'; did you mean learning_rate?`, or what to use instead of it.

    Args:
        key: as the user wrote it.
        known: names to list where none is near.
        spellings: further names that may be meant.
        advice: name of a setting that other libraries have -> what to do here.
    """
    name = str(key).replace("-", "_")
    if advice and name in advice:
        return f"unknown key {key!r}: {advice[name]}"
    guess = nearest(name, [*known, *spellings])
    hint = f"did you mean {' or '.join(guess)}?" if guess else f"known: {', '.join(sorted(known))}"
    return f"unknown key {key!r}; {hint}"


def _ordered(value: Any) -> Any:
    """Lists and sets as tuples, sets sorted: JSON and YAML know only lists, and configs are hashable values."""
    if isinstance(value, set | frozenset):
        with contextlib.suppress(TypeError):  # things of different kinds; their field will refuse them
            return tuple(sorted(value))
    return tuple(value) if isinstance(value, list) else value


# ---------------------------------------------------------------- YAML


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping from a file; a duplicate key is an error.

    Raises:
        ConfigError: the file is missing, not YAML, not a mapping, or has a key twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        values = yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 - the loader derives from SafeLoader
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected 'key: value' lines, found {type(values).__name__}")
    return values


def plain_value(text: str) -> Any:
    """A value as it is written in YAML: `64` is a number, `[q_proj, v_proj]` a list.

    Raises:
        ConfigError: it is no YAML.
    """
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{text!r} is no value as YAML has it") from error


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe loader that refuses a key given twice (PyYAML keeps the last one silently) and reads 1e-3 as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain value", key_node.start_mark)
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value


# PyYAML follows YAML 1.1, where 1e-3 (no point) is a string: learning rates are written that way.
_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
