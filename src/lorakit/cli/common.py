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
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import click
from rich.console import Console

from lorakit.cli.options import FILE_VALUES as FILE_VALUES
from lorakit.cli.options import ConfigArgument, ConfigOption
from lorakit.cli.options import config_options as config_options
from lorakit.cli.options import resolve_config as resolve_config
from lorakit.config import read_yaml
from lorakit.errors import ConfigError, LorakitError, nearest

# No markup: "[0, 1)" in a message is text. No wrapping: a log file has no width. rich itself leaves colour out where
# NO_COLOR is set or stderr is no terminal.
console = Console(stderr=True, markup=False, highlight=False, emoji=False, soft_wrap=True)

_NEVER_FROM_FILE = {"as_json", "config_file", "help"}


def emit(result: Mapping[str, Any], as_json: bool) -> None:
    """Print `result` as one line of JSON on stdout if `as_json`; otherwise nothing: people have read it on stderr."""
    if as_json:
        # ASCII, so that no terminal encoding can break it
        click.echo(json.dumps(result, allow_nan=False))


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
        with _reported(as_json="--json" in args):
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        with _reported(ctx.params["as_json"]):
            return super().invoke(ctx)


@contextlib.contextmanager
def _reported(as_json: bool) -> Iterator[None]:
    """LorakitError -> message and exit code 2; wrong usage -> click's message and 2; Ctrl-C -> 130."""
    try:
        yield
    except LorakitError as error:
        console.print(f"error: {error}")
        emit({"error": {"type": type(error).__name__, "message": str(error)}}, as_json)
        raise click.exceptions.Exit(2) from None
    except click.UsageError as error:  # click prints it
        emit({"error": {"type": "UsageError", "message": error.format_message()}}, as_json)
        raise
    except KeyboardInterrupt:
        console.print("stopped")
        emit({"error": {"type": "KeyboardInterrupt", "message": "stopped"}}, as_json)
        raise click.exceptions.Exit(130) from None


def _read_config_file(ctx: click.Context, parameter: click.Parameter, path: str | None) -> None:
    """Give the values of a `--config` file to click as defaults; those for a config class wait for `config_options`."""
    if path is None:
        return
    plain: dict[str, click.Parameter] = {}
    configured: set[str] = set()  # spellings of config-made flags; what their values may be is the config's to say
    for each in ctx.command.params:
        names = {flag.lstrip("-").replace("-", "_") for flag in each.opts}
        if isinstance(each, ConfigOption | ConfigArgument):
            configured |= names
            configured |= {str(each.name).rpartition("__")[0]} - {""}  # the section: `lora: {r: 8}`
        elif each.name not in _NEVER_FROM_FILE:
            plain |= dict.fromkeys(names | {str(each.name)}, each)
    for_click: dict[str, Any] = {}
    for_config: dict[str, Any] = {}
    problems = []
    for key, value in read_yaml(path).items():
        name = str(key).replace("-", "_")
        if name in configured:
            for_config[key] = value
        elif name not in plain:
            known = {*plain, *configured}
            guess = nearest(name, known)
            hint = f"did you mean {' or '.join(guess)}?" if guess else f"known: {', '.join(sorted(known))}"
            problems.append(f"unknown key {key!r}; {hint}")
        elif plain[name].name in for_click:
            problems.append(f"{key!r} sets {plain[name].name!r} a second time")
        elif (fault := _misfit(plain[name], value)) is not None:
            problems.append(f"{key}: {fault}")
        elif value is not None:  # null: as if the key were not there
            many = _takes_many(plain[name]) and not isinstance(value, list)
            for_click[str(plain[name].name)] = [value] if many else value
    if problems:
        raise ConfigError.listing(path, problems)
    ctx.default_map = for_click
    ctx.meta[FILE_VALUES] = (path, for_config)


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
    return None
