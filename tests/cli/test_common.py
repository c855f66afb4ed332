import dataclasses
import json
from collections.abc import Mapping
from typing import ClassVar, Literal

import click
import pytest
import yaml
from click.testing import CliRunner

from lorakit.adapter.config import LoRAConfig
from lorakit.cli.common import config_options, console, emit, resolve_config, verb
from lorakit.config import Config
from lorakit.errors import ConfigError, DataError
from lorakit.training.config import TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner(Config):
    aliases: ClassVar[Mapping[str, str]] = {"lora_r": "r"}

    r: int = 16
    """Rank."""

    names: str | tuple[str, ...] = "all-linear"
    """Which layers."""

    ranks: dict[str, int] = dataclasses.field(default_factory=dict)
    """Rank by layer."""

    layers: tuple[int, ...] | None = None
    """Layer numbers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer(Config):
    aliases: ClassVar[Mapping[str, str]] = {"lr": "learning_rate"}

    data: str
    """Rows,
    in a file."""

    inner: Inner = dataclasses.field(default_factory=Inner)
    """The inner part."""

    learning_rate: float = 1e-3
    """Peak rate."""

    mode: Literal["a", "b"] = "a"
    """One of two."""

    resume: bool = False
    """Go on."""

    limit: int | None = None
    """At most."""


@verb("made")
@config_options(Outer, positional={"data"})
def made(config: Outer, as_json: bool) -> None:
    """Show the config."""
    console.print("working")
    emit({"config": config.to_dict()}, as_json)


@verb("plain")
@click.argument("data")
@click.option("--model", required=True)
@click.option("--top_p", type=float, default=1.0)
@click.option("--adapter", multiple=True)
@click.option("--count", type=int)
@click.option("--greedy/--no_greedy", default=False)
def plain(data, model, top_p, adapter, count, greedy, as_json):
    """Show the flags."""
    emit(
        {"data": data, "model": model, "top_p": top_p, "adapter": list(adapter), "count": count, "greedy": greedy},
        as_json,
    )


@verb("failing")
@click.option("--how", type=click.Choice(["data", "interrupt"]))
def failing(how, as_json):
    """Raise."""
    raise {"data": DataError("rows.jsonl:3: [no] messages"), "interrupt": KeyboardInterrupt()}[how]


def run(command, *arguments):
    return CliRunner().invoke(command, [*arguments], catch_exceptions=False)


def config_of(*arguments):
    result = run(made, *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])["config"]


def write(path, **values):
    path.write_text(yaml.safe_dump(values))
    return str(path)


# ---------------------------------------------------------------- flags


def test_defaults_are_the_configs():
    assert config_of("rows") == Outer(data="rows").to_dict()


def test_flags_reach_fields_of_every_type():
    flags = ["--learning-rate", "2e-4", "--mode", "b", "--resume", "--limit", "7", "--lora_r=4", "--layers", "1,2"]
    flags += ["--layers", "5", "--names", "q_proj,v_proj", "--ranks", "a=b.*=3", "--ranks", "c=4"]
    assert config_of("rows", *flags) == {
        "data": "rows",
        "inner": {"r": 4, "names": ["q_proj", "v_proj"], "ranks": {"a=b.*": 3, "c": 4}, "layers": [1, 2, 5]},
        "learning_rate": 2e-4,
        "mode": "b",
        "resume": True,
        "limit": 7,
    }


@pytest.mark.parametrize("flag", ["--learning_rate", "--learning-rate", "--lr"])
def test_hyphen_underscore_and_alias_are_one_flag(flag):
    assert config_of("rows", flag, "0.5")["learning_rate"] == 0.5


@pytest.mark.parametrize(
    ("given", "kept"),
    [("all-linear", "all-linear"), ("q_proj", ["q_proj"]), (r".*\.(q|k){1,2}_proj", r".*\.(q|k){1,2}_proj")],
)
def test_names_make_a_list_and_anything_else_is_one_pattern(given, kept):
    assert config_of("rows", "--names", given)["inner"]["names"] == kept


@pytest.mark.parametrize(
    "flags",
    [
        ["--names", "a.*b", "--names", "c"],
        ["--ranks", "a"],
        ["--ranks", "a=x"],
        ["--layers", "1,x"],
        ["--mode", "c"],
        ["--limit", "1.5"],
    ],
)
def test_a_value_that_does_not_fit_its_flag_is_refused(flags):
    result = run(made, "rows", *flags)
    assert result.exit_code == 2
    assert flags[0] in result.stderr


def test_help_tells_field_texts_defaults_and_aliases():
    text = " ".join(run(made, "--help").stdout.split())
    assert "--learning_rate, --lr FLOAT Peak rate. [default: 0.001]" in text
    assert "Rank. [default: 16]" in text
    assert "--inner" not in text


# ---------------------------------------------------------------- --config


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path):
    file = write(tmp_path / "c.yaml", data="rows", lr=0.5, mode="b", inner={"lora_r": 8, "layers": [3]})
    config = config_of("--config", file, "--r", "2", "--mode", "a")
    assert config["inner"] == {**Inner().to_dict(), "r": 2, "layers": [3]}
    assert (config["data"], config["learning_rate"], config["mode"]) == ("rows", 0.5, "a")


def test_a_written_config_is_read_back_as_it_is(tmp_path):
    config = Outer(data="rows", learning_rate=1e-5, inner=Inner(r=3, names=("a",), ranks={"b": 2}), limit=4)
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    assert Outer.from_dict(config_of("--config", str(tmp_path / "run.yaml"))) == config


def test_run_yaml_of_a_training_run_is_read_back():
    config = TrainConfig(model="m", data="d", output="o", lora=LoRAConfig(r=4, target_modules=("q",)), max_steps=3)
    assert resolve_config(TrainConfig, {}, yaml.safe_load(config.to_yaml())) == config


@pytest.mark.parametrize("name", [*TrainConfig.aliases, *LoRAConfig.aliases])
def test_every_alias_is_a_flag_of_train(name):
    @verb("train")
    @config_options(TrainConfig, positional={"data"})
    def command(config, as_json):
        """Nothing."""

    flags = {flag for parameter in command.params for flag in parameter.opts}
    assert f"--{name}" in flags or name == "lora_config"


def test_all_problems_are_told_at_once(tmp_path):
    file = write(tmp_path / "c.yaml", lerning_rate=1, mode="c", inner={"rr": 1, "r": "8"})
    with pytest.raises(ConfigError) as caught:
        resolve_config(Outer, {}, yaml.safe_load((tmp_path / "c.yaml").read_text()), where=file)
    message = str(caught.value)
    assert "c.yaml: 5 problems:" in message
    for part in [
        "'lerning_rate'; did you mean learning_rate",
        "mode: ",
        "'rr'; did you mean r",
        "inner: r: ",
        "'data' is required",
    ]:
        assert part in message


def test_a_key_given_in_two_spellings_is_refused():
    with pytest.raises(ConfigError, match="'r' sets 'r' a second time"):
        resolve_config(Outer, {}, {"data": "rows", "inner": {"lora_r": 1}, "r": 2})


def test_unknown_key_through_the_command(tmp_path):
    result = run(made, "rows", "--config", write(tmp_path / "c.yaml", lerning_rate=1), "--json")
    assert result.exit_code == 2
    assert "did you mean learning_rate" in result.stderr
    error = json.loads(result.stdout.splitlines()[-1])["error"]
    assert error["type"] == "ConfigError"
    assert "lerning_rate" in error["message"]


def test_plain_flags_come_from_the_file_too(tmp_path):
    file = write(
        tmp_path / "c.yaml", **{"data": "rows", "model": "m", "top-p": 0.5, "adapter": ["a", "b"], "greedy": True}
    )
    result = run(plain, "--config", file, "--model", "other", "--json")
    assert json.loads(result.stdout) == {
        "data": "rows", "model": "other", "top_p": 0.5, "adapter": ["a", "b"], "count": None, "greedy": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modle": "m"}, "unknown key 'modle'; did you mean model"),
        ({"json": True}, "unknown key 'json'"),
        ({"top_p": 1, "top-p": 2}, "sets 'top_p' a second time"),
        ({"count": [1]}, "count: takes one value, found a list of 1"),
        ({"count": True}, "count: expected integer, found True"),
        ({"greedy": "yes"}, "greedy: expected true or false, found 'yes'"),
        ({"adapter": [{"a": 1}]}, "adapter: expected a plain value, found dict"),
    ],
)
def test_bad_plain_values_in_a_file_are_refused(tmp_path, values, message):
    result = run(plain, "rows", "--model", "m", "--config", write(tmp_path / "c.yaml", **values))
    assert result.exit_code == 2
    assert message in result.stderr


def test_missing_config_file_is_one_message(tmp_path):
    result = run(plain, "rows", "--model", "m", "--config", str(tmp_path / "none.yaml"))
    assert result.exit_code == 2
    assert "none.yaml: no such file" in result.stderr


# ---------------------------------------------------------------- errors and streams


def test_a_lorakit_error_is_one_message_and_exit_code_two():
    result = run(failing, "--how", "data")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error: rows.jsonl:3: [no] messages\n"  # brackets are no markup


def test_an_error_is_the_last_object_with_json():
    result = run(failing, "--how", "data", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout) == {"error": {"type": "DataError", "message": "rows.jsonl:3: [no] messages"}}


def test_wrong_usage_is_an_object_with_json_too():
    result = run(plain, "rows", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["type"] == "UsageError"
    assert "--model" in result.stderr


def test_interrupt_exits_with_130():
    result = run(failing, "--how", "interrupt")
    assert result.exit_code == 130
    assert "Traceback" not in result.stderr


def test_people_read_stderr_and_machines_stdout():
    result = run(made, "rows")
    assert (result.stdout, result.stderr) == ("", "working\n")


def test_emit_is_one_line_of_ascii(capsys):
    emit({"text": "caf\u00e9\nx"}, as_json=True)
    assert capsys.readouterr().out == '{"text": "caf\\u00e9\\nx"}\n'
