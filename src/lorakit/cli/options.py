"""Flags made from a config class, and the config made from flags and file. Knows no particular config."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Literal, TypeVar

import click

from lorakit.config import Config, unknown_key
from lorakit.errors import ConfigError

AnyConfig = TypeVar("AnyConfig", bound=Config)

# "q_proj, all-linear": names and presets, where anything else is a regular expression
_NAMES = re.compile(r"\s*[\w.-]+(\s*,\s*[\w.-]+)*\s*")


# in click's ctx.meta: (path, values) of the `--config` file, for the flags made from a config class
FILE_VALUES = "lorakit.file_values"


class ConfigOption(click.Option):
    """A flag that stands for a field of a config class."""

    config_class: type[Config]


class _OneOf(click.Choice[str]):
    """One of a field's literals, in any spelling that the field takes: fp32 or float32."""

    def __init__(self, choices: Sequence[str], as_taken: Callable[[Any], Any]) -> None:
        super().__init__(choices)
        self._as_taken = as_taken

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return super().convert(self._as_taken(value), param, ctx)


class _NumberOr(click.ParamType[int | str]):
    """A whole number, or one of a few words."""

    def __init__(self, words: Sequence[str]) -> None:
        self.name = f"integer|{'|'.join(words)}"
        self._words = words

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value in self._words:
            return str(value)
        return click.INT.convert(value, param, ctx)


class ConfigArgument(click.Argument):
    """A positional for a field of a config class. Never required by click: a `--config` file may hold it."""

    config_class: type[Config]


def config_options(
    config_class: type[Config], positional: AbstractSet[str] = frozenset()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """One flag per field of `config_class` and of the configs nested in it; the function receives `config`, finished.

    Args:
        config_class: its type hints give the flags' types, the strings under its fields their help, its `aliases`
            further spellings.
        positional: fields given without a flag (or with one), in the order of their declaration.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        parameters = _parameters(config_class, positional)
        names = [str(parameter.name) for parameter in parameters]
        for parameter in parameters:
            parameter.config_class = config_class

        @functools.wraps(function)
        def with_config(*args: Any, **values: Any) -> None:
            context = click.get_current_context()
            flags = {name: values.pop(name) for name in names}
            for field in positional:
                _take_either(flags, field)
            path, from_file = context.meta.get(FILE_VALUES, (None, {}))
            config = resolve_config(config_class, flags, from_file, where=path or context.command_path)
            function(*args, config=config, **values)

        # where click looks for the parameters of a function, the last one first
        with_config.__click_params__ = [  # type: ignore[attr-defined]
            *getattr(function, "__click_params__", []),
            *reversed(parameters),
        ]
        return with_config

    return decorate


def resolve_config(
    config_class: type[AnyConfig], flags: Mapping[str, Any], from_file: Mapping[str, Any], where: str = "settings"
) -> AnyConfig:
    """Flags over file over defaults.

    Args:
        config_class: what to make.
        flags: field name, or section__field for a nested config -> value; None means "not given".
        from_file: field name or alias -> value. Fields of nested configs stand in their section (`lora: {r: 8}`, as in
            run.yaml) or at the top (`lora_r: 8`, as the flags are called).
        where: what to call the settings in errors.

    Raises:
        ConfigError: unknown key, key given twice, missing or bad value; all of them at once.
    """
    names = spellings(config_class)
    sections = section_names(config_class)
    values: dict[tuple[str, str], tuple[str, Any]] = {}  # (section, field) -> (the name it is given by, value)
    problems: list[str] = []

    def put(place: tuple[str, str], name: str, value: Any, key: str) -> None:
        if place in values:
            problems.append(f"{key!r} sets {place[1]!r} a second time")
        values[place] = name, value

    for key, value in from_file.items():
        name = str(key).replace("-", "_")
        if (section := sections.get(name)) is not None:
            if not isinstance(value, Mapping):
                problems.append(f"{key}: expected 'name: value' lines, found {value!r}")
                continue
            for inner, inner_value in value.items():
                name = str(inner).replace("-", "_")
                if names.get(name, ("", ""))[0] == section:
                    put(names[name], name, inner_value, f"{key}: {inner}")
                else:
                    problems.append(unknown_key(inner, names, advice=advice_of(config_class)))
        elif name in names:
            put(names[name], name, value, str(key))
        else:
            problems.append(unknown_key(key, names, advice=advice_of(config_class)))
    by_flag: dict[tuple[str, str], tuple[str, Any]] = {}
    for key, value in flags.items():
        if value is not None:
            name = key.rpartition("__")[2]
            place = names[name]
            if place in by_flag:
                problems.append(f"--{name} sets what --{by_flag[place][0]} sets too: give one of them")
            by_flag[place] = name, value

    nested: dict[str, Any] = {}
    for (section, _), (name, value) in (values | by_flag).items():
        if section:
            nested.setdefault(section, {})[name] = value
        else:
            nested[name] = value
    try:
        config = config_class.from_dict(nested, where)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError.listing(where, problems)
    return config


def _take_either(flags: dict[str, Any], field: str) -> None:
    """Put a positional that was given by its flag where the positional would stand.

    Raises:
        ConfigError: it was given both ways.
    """
    by_flag = flags.pop(_by_flag(field))
    if by_flag is not None and flags[field] is not None:
        raise ConfigError(f"{field} is given twice: as {flags[field]!r} and by a flag as {by_flag!r}; give one of them")
    if by_flag is not None:
        flags[field] = by_flag


def _by_flag(field: str) -> str:
    return f"{field}_by_flag"


def sections_of(config_class: type[Config]) -> dict[str, type[Config]]:
    """The fields of a config class that hold a config: name -> its class."""
    hints = typing.get_type_hints(config_class)
    return {
        f.name: hints[f.name]
        for f in dataclasses.fields(config_class)
        if isinstance(hints[f.name], type) and issubclass(hints[f.name], Config)
    }


def section_names(config_class: type[Config]) -> dict[str, str]:
    """Every accepted name of every section -> the field that holds it."""
    sections = sections_of(config_class)
    aliases = {alias: field for alias, field in config_class.aliases.items() if field in sections}
    return {**{field: field for field in sections}, **aliases}


def advice_of(config_class: type[Config]) -> dict[str, str]:
    """Settings of other libraries that the class and its sections refuse with a word -> that word."""
    return {k: v for cls in (config_class, *sections_of(config_class).values()) for k, v in cls.advice.items()}


def spellings(config_class: type[Config]) -> dict[str, tuple[str, str]]:
    """Every accepted name of every field -> (section, field)."""
    sections = sections_of(config_class)
    names: dict[str, tuple[str, str]] = {}
    for section, cls in [("", config_class), *sections.items()]:
        own = {f.name: f.name for f in dataclasses.fields(cls) if f.init}
        switches = {name: field for name, (field, _, _) in cls.switches.items()}
        for name, field in {**own, **cls.aliases, **switches}.items():
            if section == "" and field in sections:
                continue
            assert name not in names, f"{name} is a setting of {config_class.__name__} and of its section {section}"
            names[name] = (section, field)
    return names


def _parameters(config_class: type[Config], positional: AbstractSet[str]) -> list[ConfigOption | ConfigArgument]:
    """The click parameters in the order of the fields."""
    names = spellings(config_class)
    classes = {"": config_class, **sections_of(config_class)}
    docs = {section: _field_docs(cls) for section, cls in classes.items()}
    # what a nested config is by default in this one, which may differ from its own defaults
    made: dict[str, Config] = {
        f.name: f.default_factory()
        for f in dataclasses.fields(config_class)
        if f.name in classes and f.default_factory is not dataclasses.MISSING
    }
    parameters: list[ConfigOption | ConfigArgument] = []
    for section, field in dict.fromkeys(names.values()):
        cls = classes[section]
        prefix = f"{section}__" if section else ""
        internal = f"{prefix}{field}"
        if field in positional:
            parameters.append(ConfigArgument([field], required=False, metavar=field.upper()))
            internal = _by_flag(field)
        own = [name for name, place in names.items() if place == (section, field) and name not in cls.switches]
        description = next(f for f in dataclasses.fields(cls) if f.name == field)
        hint = typing.get_type_hints(cls)[field]
        parameters.append(
            ConfigOption(
                [internal, *_flags(own, hint)],
                help=_help(description, docs[section].get(field, ""), made.get(section)),
                **_kind(hint, functools.partial(cls.as_taken, field)),
            )
        )
        parameters += [
            ConfigOption(
                [f"{prefix}{switch}", *_flags([switch], bool)],
                help=f"The same as --{field} {if_true}.",
                **_kind(bool, functools.partial(cls.as_taken, field)),
            )
            for switch, (switched, if_true, _) in cls.switches.items()
            if switched == field
        ]
    return parameters


def _flags(names: list[str], hint: Any) -> list[str]:
    if hint is bool:
        return [f"--{name}/--no_{name}" for name in names]
    return [f"--{name}" for name in names]


def _help(field: dataclasses.Field[Any], text: str, made: Config | None) -> str:
    default = field.default
    if made is not None:
        default = getattr(made, field.name)
    elif field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    if default is dataclasses.MISSING:
        return f"{text}  [required]"
    if default is None or default in ((), {}):
        return text
    return f"{text}  [default: {default}]"


def _field_docs(cls: type[Config]) -> dict[str, str]:
    """The string literal under each field. Python drops it; the source has it."""
    (class_node,) = ast.parse(inspect.cleandoc(inspect.getsource(cls))).body
    assert isinstance(class_node, ast.ClassDef)
    docs = {}
    for node, below in itertools.pairwise(class_node.body):
        match node, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = " ".join(text.split())
    return docs


def _kind(hint: Any, as_taken: Callable[[Any], Any]) -> dict[str, Any]:
    """The click settings for a type hint. A parameter that is not given is None, whatever its type.

    Args:
        hint: of the field.
        as_taken: the field's own reading of a value (`Config.as_taken`).
    """
    alternatives = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    alternatives = tuple(kind for kind in alternatives if kind is not types.NoneType)
    if len(alternatives) == 2 and str in alternatives:
        return _repeated("NAME[,NAME...]|REGEX", _names_or_pattern)
    if len(alternatives) == 2 and int in alternatives:
        (words,) = (typing.get_args(kind) for kind in alternatives if kind is not int)
        return {"type": _NumberOr(words), "default": None}
    (kind,) = alternatives
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return {"type": _OneOf(arguments, as_taken), "default": None}
    if origin is tuple:
        return _repeated(f"{arguments[0].__name__.upper()}[,...]", functools.partial(_items, arguments[0]))
    if origin in (dict, Mapping):
        return _repeated(f"NAME={arguments[1].__name__.upper()}", functools.partial(_pairs, arguments[1]))
    assert kind in (bool, int, float, str), f"no flag can be made for {hint}"
    return {"type": kind, "default": None}


def _repeated(metavar: str, parse: Callable[[Sequence[str]], Any]) -> dict[str, Any]:
    """A flag that may be given several times; `parse` sees all its values together."""

    def parsed(ctx: click.Context, parameter: click.Parameter, values: Sequence[str]) -> Any:
        try:
            return parse(values) if values else None
        except ValueError as error:
            raise click.BadParameter(str(error), ctx, parameter) from None

    return {"type": str, "multiple": True, "metavar": metavar, "callback": parsed}


def _items(kind: type, values: Sequence[str]) -> tuple[Any, ...]:
    return tuple(kind(item.strip()) for value in values for item in value.split(","))


def _pairs(kind: type, values: Sequence[str]) -> dict[str, Any]:
    pairs = {}
    for value in values:
        name, equals, number = value.rpartition("=")  # the last one: the name may be a regular expression with = in it
        if not equals or not name:
            raise ValueError(f"{value!r} is not NAME=VALUE")
        pairs[name] = kind(number)
    return pairs


def _names_or_pattern(values: Sequence[str]) -> str | tuple[str, ...]:
    """Names make a tuple; anything else ("all-linear" alone, or a regular expression, commas and all) is one string."""
    if all(_NAMES.fullmatch(value) for value in values):
        names = _items(str, values)
        return names if len(names) > 1 or "-" not in names[0] else names[0]  # "all-linear", as configs write it
    if len(values) > 1:
        raise ValueError(f"a regular expression stands alone (got {', '.join(values)})")
    return values[0]
