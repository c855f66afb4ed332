"""What all verbs share: `--json`, `--config`, errors as one message, and flags made from config classes.

A verb module defines `command`:

    @verb("train")
    @config_options(TrainConfig, positional={"data"})     # one flag per field; the function receives `config`
    def command(config: TrainConfig, as_json: bool) -> None: ...

    @verb("eval")
    @click.argument("data")                               # or plain click options; `--config` fills them too
    @click.option("--model", required=True)
    def command(data: str, model: str, as_json: bool) -> None: ...

Streams: text for people goes to stderr (`console`), results to stdout; with `--json` the last line of stdout is one
object (`emit`).
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import click
from rich.console import Console

from lorakit.cli.options import FILE_VALUES as FILE_VALUES
from lorakit.cli.options import ConfigArgument, ConfigOption, advice_of, section_names, spellings
from lorakit.cli.options import config_options as config_options
from lorakit.cli.options import resolve_config as resolve_config
from lorakit.config import read_yaml, unknown_key
from lorakit.errors import ConfigError, LorakitError
from lorakit.training.config import TrainConfig

# No markup: "[0, 1)" in a message is text. No wrapping: a log file has no width. rich itself leaves colour out where
# NO_COLOR is set or stderr is no terminal.
console = Console(stderr=True, markup=False, highlight=False, emoji=False, soft_wrap=True)

_NEVER_FROM_FILE = {"as_json", "config_file", "help"}

# verb -> what it does not take from a file written for training, where the name means another thing
_ANOTHER_IN_TRAINING = {
    "eval": {"data", "batch_size"},
    "generate": {"output", "batch_size", "prompt"},
    "demo": {"output"},
    "combine": {"method", "output", "rank"},
    "compare": {"output"},
    "compress": {"data", "output", "rank"},
    "convert": {"output"},
    "export": {"output"},
    "extract": {"output", "rank", "target_modules", "modules_to_save"},
    "merge": {"data", "dtype", "output"},
}


_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


class Memory(click.ParamType[int]):
    """An amount of memory: 16GB, 800MB, or bytes; none at all only where that means something."""

    name = "amount"

    def __init__(self, *, none: bool = False) -> None:
        self.none = none

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes."""
        match = re.fullmatch(r"\s*([\d.]+)\s*([kmgt]?)i?b?\s*", str(value).lower())
        if match is None or (float(match[1]) <= 0 and not self.none):
            self.fail(f"{value!r} is no amount of memory; write 16GB or 800MB", param, ctx)
        return int(float(match[1]) * _UNITS[match[2]])


def emit(result: Mapping[str, Any], as_json: bool) -> None:
    """Print `result` as one line of JSON on stdout if `as_json`; otherwise nothing: people have read it on stderr.

    JSON has no NaN and no infinity: such a number is null.
    """
    if as_json:
        # ASCII, so that no terminal encoding can break it
        click.echo(json.dumps(_finite({"ok": True, **result}), allow_nan=False))


def columns(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> Iterator[str]:
    """Lines of a table: cells under one another, to the right of their column unless it is one of `left`."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = enumerate(zip(row, widths, strict=True))
        yield "  ".join(c.ljust(width) if i in left else c.rjust(width) for i, (c, width) in cells).rstrip()


def numbers(flag: str, values: Sequence[str]) -> list[float]:
    """What a flag that takes numbers, with commas or given again, was told.

    Raises:
        ConfigError: something else is among them.
    """
    try:
        return [float(part) for value in values for part in value.split(",")]
    except ValueError:
        raise ConfigError(f"{flag}: numbers with commas between them, e.g. 0.7,0.3 (got {', '.join(values)})") from None


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def verb(name: str) -> Callable[[Callable[..., None]], click.Command]:
    """Make a function the verb `name`.

    Adds `--json`, passed on as `as_json`, and `--config`; whatever goes wrong is told in one message. In its flags `-`
    and `_` are the same.
    """

    def decorate(function: Callable[..., None]) -> click.Command:
        function = click.option(
            "--config",
            "config_file",
            metavar="FILE.yaml",
            is_eager=True,
            expose_value=False,
            callback=_read_config_file,
            help="Settings from a YAML file: the same names as these flags, which override it.",
        )(function)
        function = click.option(
            "--json",
            "as_json",
            is_flag=True,
            help="Last line of stdout: one JSON object. Text for people goes to stderr.",
        )(function)
        settings = {
            "token_normalize_func": lambda token: token.replace("-", "_"),
            "help_option_names": ["-h", "--help"],
            "max_content_width": 120,
        }
        return click.command(name, cls=_Verb, context_settings=settings)(function)

    return decorate


class _Verb(click.Command):
    """A command whose errors, in flags or at work, are told in one message and, with `--json`, in one object."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        with reported(as_json="--json" in args):
            return super().make_context(info_name, args, parent, **extra)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click, with a word on flags that other libraries have."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            advice = advice_of(TrainConfig).get(error.option_name.lstrip("-"))
            if advice is None:
                raise
            raise click.UsageError(f"No such option '{error.option_name}': {advice}.", ctx) from None

    def invoke(self, ctx: click.Context) -> Any:
        with reported(ctx.params["as_json"]):
            return super().invoke(ctx)


@contextlib.contextmanager
def reported(as_json: bool) -> Iterator[None]:
    """LorakitError -> message and exit code 2; wrong usage -> click's message and 2; Ctrl-C -> 130; anything else is a
    bug: traceback and 1. With `--json` an object says the same.
    """
    try:
        yield
    except (click.exceptions.Exit, click.Abort):
        raise
    except LorakitError as error:
        console.print(f"error: {error}")
        _emit_failure(type(error).__name__, str(error), as_json)
        raise click.exceptions.Exit(2) from None
    except click.UsageError as error:  # click prints it
        _emit_failure("UsageError", error.format_message(), as_json)
        raise
    except KeyboardInterrupt:
        console.print("stopped")
        _emit_failure("KeyboardInterrupt", "stopped", as_json)
        raise click.exceptions.Exit(130) from None
    except Exception as error:  # Python prints the traceback
        _emit_failure(type(error).__name__, str(error), as_json)
        raise


def _emit_failure(kind: str, message: str, as_json: bool) -> None:
    emit({"ok": False, "error": {"type": kind, "message": message}}, as_json)


def _read_config_file(ctx: click.Context, parameter: click.Parameter, path: str | None) -> None:
    """Give the values of a `--config` file to click as defaults; those for a config class wait for `config_options`."""
    if path is None:
        return
    plain: dict[str, click.Parameter] = {}
    configured: set[str] = set()  # names of config-made flags; what their values may be is the config's to say
    for each in ctx.command.params:
        if isinstance(each, ConfigOption | ConfigArgument):
            configured |= {*spellings(each.config_class), *section_names(each.config_class)}
        elif each.name not in _NEVER_FROM_FILE:
            names = {flag.lstrip("-").replace("-", "_") for flag in each.opts} | {str(each.name)}
            if isinstance(each, click.Argument) and _takes_many(each):
                names |= {name.removesuffix("s") for name in names}  # as the flags that may be given again are called
            plain |= dict.fromkeys(names, each)
    values = read_yaml(path)
    problems: list[str] = []
    all_of_training = {*spellings(TrainConfig), *section_names(TrainConfig)}
    of_training = not configured < all_of_training  # a part of its settings, or none, is another verb's
    if not of_training:
        values, problems = _without_training(str(ctx.info_name), plain, configured, values, path)
    for_click: dict[str, Any] = {}
    for_config: dict[str, Any] = {}
    set_by: dict[str | None, object] = {}  # name of a parameter -> the key that set it
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name in configured:
            for_config[key] = value
        elif name not in plain:
            training = {} if of_training else spellings(TrainConfig)  # it may be a misspelled one of those too
            problems.append(unknown_key(key, {*plain, *configured}, training, advice_of(TrainConfig)))
        elif (earlier := set_by.get(plain[name].name)) is not None:
            problems.append(f"{key!r} sets {earlier!r} a second time")
        elif (fault := _misfit(plain[name], value)) is not None:
            problems.append(f"{key}: {fault}")
        elif value is not None:  # null: as if the key were not there
            many = _takes_many(plain[name]) and not isinstance(value, list)
            for_click[str(plain[name].name)] = [value] if many else value
            set_by[plain[name].name] = key
    if problems:
        raise ConfigError.listing(path, problems)
    ctx.default_map = for_click
    ctx.meta[FILE_VALUES] = (path, for_config)


def _without_training(
    verb_name: str, plain: dict[str, click.Parameter], configured: set[str], values: Mapping[str, Any], path: str
) -> tuple[dict[str, Any], list[str]]:
    """Leave out what only training knows of a file written for it, such as a run's `run.yaml`; tell what is taken.

    Args:
        verb_name: another verb than train.
        plain: name -> parameter of the verb; further spellings of those that training has too are added.
        configured: names of further settings of the verb, which a config class takes.
        values: of the file.
        path: of the file.

    Returns:
        (the values that remain, unknown keys in sections)
    """
    fields, sections = spellings(TrainConfig), section_names(TrainConfig)
    another = _ANOTHER_IN_TRAINING.get(verb_name, set())
    for spelling, (_, field) in fields.items():
        if field in plain and field not in another:
            plain.setdefault(spelling, plain[field])
    named = {key: str(key).replace("-", "_") for key in values}
    own = {*plain, *configured}
    only_training = {key for key, name in named.items() if name in {*fields, *sections} and name not in own}
    if not only_training:
        return dict(values), []
    remaining = {k: v for k, v in values.items() if k not in only_training and named[k] not in another}
    taken = [str(key) for key, value in remaining.items() if named[key] in own and value is not None]
    console.print(f"config {path} was written for training; taken from it: {', '.join(taken) or 'nothing'}")
    inner = [key for k in only_training if named[k] in sections and isinstance(values[k], Mapping) for key in values[k]]
    return remaining, [unknown_key(key, fields) for key in inner if str(key).replace("-", "_") not in fields]


def _takes_many(parameter: click.Parameter) -> bool:
    return parameter.nargs != 1 or parameter.multiple


def _misfit(parameter: click.Parameter, value: Any) -> str | None:
    """Why a YAML value cannot stand for this parameter, where click would take it for something else or fail."""
    if isinstance(value, list) and not _takes_many(parameter):
        return f"takes one value, found a list of {len(value)}"
    values = value if isinstance(value, list) else [value]
    for each in values:
        if isinstance(each, list | dict):
            return f"expected a plain value, found {type(each).__name__}"
        if each is not None and isinstance(each, bool) != isinstance(parameter.type, click.types.BoolParamType):
            expected = "true or false" if isinstance(parameter.type, click.types.BoolParamType) else parameter.type.name
            return f"expected {expected}, found {each!r}"
        whole = isinstance(parameter.type, click.types.IntParamType | click.IntRange)
        if whole and isinstance(each, float) and each != int(each):
            return f"expected a whole number, found {each!r}"
    return None
