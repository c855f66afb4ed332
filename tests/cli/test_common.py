import dataclasses
import json
from collections.abc import Mapping
from typing import ClassVar, Literal

import click
import pytest
import yaml
from click.testing import CliRunner

from lorakit.adapter.config import LoRAConfig
from lorakit.adapter.prompt_config import PromptConfig
from lorakit.cli import main
from lorakit.cli.common import config_options, console, emit, resolve_config, verb
from lorakit.config import Config, DtypeName
from lorakit.errors import ConfigError, DataError
from lorakit.training.config import TrainConfig
from tiny_subjects import conversation, write_jsonl


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner(Config):
    aliases: ClassVar[Mapping[str, str]] = {"lora_r": "r"}
    switches: ClassVar[Mapping[str, tuple[str, str, str]]] = {"use_fine": ("grain", "fine", "coarse")}
    advice: ClassVar[Mapping[str, str]] = {"use_dora": "not here"}

    r: int = 16
    """Rank."""

    names: str | tuple[str, ...] = "all-linear"
    """Which layers."""

    ranks: dict[str, int] = dataclasses.field(default_factory=dict)
    """Rank by layer."""

    layers: tuple[int, ...] | None = None
    """Layer numbers."""

    grain: Literal["coarse", "fine"] = "coarse"
    """How fine."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer(Config):
    aliases: ClassVar[Mapping[str, str]] = {"lr": "learning_rate", "train_file": "data", "inner_config": "inner"}

    data: str
    """Rows,
    in a file."""

    inner: Inner = dataclasses.field(default_factory=Inner)
    """The inner part."""

    learning_rate: float = 1e-3
    """Peak rate."""

    mode: Literal["a", "b"] = "a"
    """One of two."""

    dtype: DtypeName = "auto"
    """Of numbers."""

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


@verb("positional")
@click.argument("adapters", nargs=-1, required=True)
def positional(adapters, as_json):
    """Take adapters as `combine` does."""
    emit({"adapters": list(adapters)}, as_json)


@verb("flagged")
@click.option("--adapter", "adapters", multiple=True, required=True)
def flagged(adapters, as_json):
    """Take adapters as `merge` and `eval` do."""
    emit({"adapters": list(adapters)}, as_json)


@verb("failing")
@click.option("--how", type=click.Choice(["data", "interrupt", "bug"]))
def failing(how, as_json):
    """Raise."""
    raise {
        "data": DataError("rows.jsonl:3: [no] messages"), "interrupt": KeyboardInterrupt(), "bug": KeyError("x")
    }[how]  # fmt: skip


@verb("eval")
@click.argument("data")
@click.option("--model", required=True)
@click.option("--batch-size", type=int, default=32)
@click.option("--max-length", type=int, default=7)
@click.option("--seed", type=int)
def like_eval(data, model, batch_size, max_length, seed, as_json):
    """Show the flags of a verb that shares some with training."""
    emit({"data": data, "model": model, "batch_size": batch_size, "max_length": max_length, "seed": seed}, as_json)


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
    flags += ["--use-fine", "--dtype", "torch.bfloat16"]
    inner = {"r": 4, "names": ["q_proj", "v_proj"], "ranks": {"a=b.*": 3, "c": 4}, "layers": [1, 2, 5], "grain": "fine"}
    assert config_of("rows", *flags) == {
        "data": "rows",
        "inner": inner,
        "learning_rate": 2e-4,
        "mode": "b",
        "dtype": "bf16",
        "resume": True,
        "limit": 7,
    }


@pytest.mark.parametrize("flag", ["--learning_rate", "--learning-rate", "--lr"])
def test_hyphen_underscore_and_alias_are_one_flag(flag):
    assert config_of("rows", flag, "0.5")["learning_rate"] == 0.5


@pytest.mark.parametrize("flag", ["--data", "--train-file"])
def test_a_positional_may_be_given_by_a_flag(flag):
    assert config_of(flag, "rows") == config_of("rows")
    result = run(made, "rows", flag, "others")
    assert result.exit_code == 2
    assert "data is given twice: as 'rows' and by a flag as 'others'" in result.stderr


def test_a_switch_is_a_flag_and_stands_against_the_file(tmp_path):
    assert config_of("rows", "--use_fine")["inner"]["grain"] == "fine"
    file = write(tmp_path / "c.yaml", use_fine=True)
    assert config_of("rows", "--config", file)["inner"]["grain"] == "fine"
    assert config_of("rows", "--config", file, "--no-use-fine")["inner"]["grain"] == "coarse"
    assert config_of("rows", "--config", file, "--grain", "coarse")["inner"]["grain"] == "coarse"
    result = run(made, "rows", "--grain", "fine", "--use-fine")
    assert result.exit_code == 2
    assert "--use_fine sets what --grain sets too" in result.stderr


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
        ["--dtype", "float8"],
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
    assert "--use_fine / --no_use_fine The same as --grain fine." in text
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


@verb("train")
@config_options(TrainConfig, positional={"data"})
def like_train(config, as_json):
    """Show the config."""
    emit({"config": config.to_dict()}, as_json)


@pytest.mark.parametrize(
    "name", [name for each in (TrainConfig, LoRAConfig, PromptConfig) for name in (*each.aliases, *each.switches)]
)
def test_every_alias_is_a_flag_of_train(name):
    flags = {flag for parameter in like_train.params for flag in parameter.opts}
    assert f"--{name}" in flags or name in ("lora_config", "prompt_config")


def test_a_command_line_in_the_spelling_of_other_libraries():
    flags = [
        *("--train_file", "d.jsonl", "--validation_file", "v.jsonl", "--model_name_or_path", "m", "--output_dir", "o"),
        *("--warmup_ratio", "0.1", "--save_total_limit", "3", "--torch_dtype", "bfloat16", "--max_steps", "-1"),
        *("--num_train_epochs", "2", "--per_device_train_batch_size", "4", "--use_rslora", "--lora_alpha", "8"),
    ]
    result = run(like_train, *flags, "--json")
    assert result.exit_code == 0, result.stderr
    assert TrainConfig.from_dict(json.loads(result.stdout)["config"]) == TrainConfig(
        model="m", data="d.jsonl", output="o", validation="v.jsonl", warmup=0.1, keep_checkpoints=3, dtype="bf16",
        epochs=2.0, batch_size=4, lora={"alpha": 8.0, "scaling": "rslora"},
    )  # fmt: skip


def test_a_file_in_the_spelling_of_other_libraries(tmp_path):
    file = write(
        tmp_path / "c.yaml", base_model="m", dataset="d.jsonl", eval_file="v.jsonl", sequence_len=64, num_epochs=2,
        val_set_size=0.1, torch_dtype="float16", max_steps=-1, lora_config={"lora_r": 4, "use_rslora": True},
    )  # fmt: skip
    result = run(like_train, "--config", file, "--json")
    assert result.exit_code == 0, result.stderr
    assert TrainConfig.from_dict(json.loads(result.stdout)["config"]) == TrainConfig(
        model="m", data="d.jsonl", validation="v.jsonl", max_length=64, epochs=2.0, validation_share=0.1, dtype="fp16",
        lora={"r": 4, "scaling": "rslora"},
    )  # fmt: skip


@pytest.mark.parametrize("name", [*TrainConfig.advice, *LoRAConfig.advice])
def test_a_setting_of_another_library_is_refused_with_advice_as_flag_and_in_files(name, tmp_path):
    advice = {**TrainConfig.advice, **LoRAConfig.advice}[name]
    for command in (like_train, plain):
        result = run(command, "rows", "--" + name.replace("_", "-"), "1", "--json")
        assert result.exit_code == 2
        assert advice in json.loads(result.stdout)["error"]["message"]
        assert f"No such option '--{name}': {advice}." in result.stderr
        result = run(command, "rows", "--model", "m", "--config", write(tmp_path / "c.yaml", **{name: True}))
        assert result.exit_code == 2
        assert f"unknown key '{name}': {advice}" in result.stderr


def test_an_unknown_flag_names_the_nearest():
    result = run(like_train, "rows", "--lerning_rate", "1")
    assert result.exit_code == 2
    assert "--learning_rate" in result.stderr


def test_all_problems_are_told_at_once(tmp_path):
    file = write(tmp_path / "c.yaml", lerning_rate=1, mode="c", inner_config={"rr": 1, "r": "8", "use_dora": True})
    with pytest.raises(ConfigError) as caught:
        resolve_config(Outer, {}, yaml.safe_load((tmp_path / "c.yaml").read_text()), where=file)
    message = str(caught.value)
    assert "c.yaml: 6 problems:" in message
    for part in [
        "'lerning_rate'; did you mean learning_rate",
        "mode: ",
        "'rr'; did you mean r",
        "'use_dora': not here",
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
        "ok": True,
        "data": "rows", "model": "other", "top_p": 0.5, "adapter": ["a", "b"], "count": None, "greedy": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modle": "m"}, "unknown key 'modle'; did you mean model"),
        ({"json": True}, "unknown key 'json'"),
        ({"top_p": 1, "top-p": 2}, "'top_p' sets 'top-p' a second time"),
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


@pytest.mark.parametrize("command", [positional, flagged])
@pytest.mark.parametrize("key", ["adapter", "adapters"])
@pytest.mark.parametrize("value", ["a", ["a", "b"]])
def test_a_file_names_adapters_in_the_singular_or_the_plural(tmp_path, command, key, value):
    result = run(command, "--config", write(tmp_path / "c.yaml", **{key: value}), "--json")
    assert json.loads(result.stdout)["adapters"] == list(value)


@pytest.mark.parametrize("command", [positional, flagged])
def test_adapters_given_in_both_spellings_are_refused(tmp_path, command):
    result = run(command, "--config", write(tmp_path / "c.yaml", adapter="a", adapters=["b"]))
    assert result.exit_code == 2
    assert "'adapters' sets 'adapter' a second time" in result.stderr


@pytest.mark.parametrize("verb_name", ["chat", "generate", "inspect", "compress", "convert", "export"])
def test_a_verb_of_one_adapter_names_the_key_to_use(tmp_path, verb_name):
    for values, message in [
        ({"adapters": "a"}, "unknown key 'adapters'; did you mean adapter"),
        ({"adapter": ["a", "b"]}, "adapter: takes one value, found a list of 2"),
    ]:
        result = run(main, verb_name, "--config", write(tmp_path / "c.yaml", **values))
        assert result.exit_code == 2
        assert message in result.stderr


# ---------------------------------------------------------------- a file written for training


def run_yaml(path, **changes):
    settings = TrainConfig(model="m", data="rows", output="runs/x", batch_size=16, max_length=99, lora=LoRAConfig(r=4))
    path.write_text(yaml.safe_dump(settings.to_dict() | changes, sort_keys=False))
    return str(path)


def test_another_verb_takes_of_it_what_means_the_same_and_says_so(tmp_path):
    file = run_yaml(tmp_path / "run.yaml")
    result = run(like_eval, "test", "--config", file, "--max-length", "5", "--json")
    assert json.loads(result.stdout) == {
        "ok": True,
        "data": "test",
        "model": "m",
        "batch_size": 32,
        "max_length": 5,
        "seed": 0,
    }
    assert f"config {file} was written for training; taken from it: model, max_length, seed\n" == result.stderr


def test_the_rows_a_run_was_trained_on_are_not_those_to_measure(tmp_path):
    result = run(like_eval, "--config", run_yaml(tmp_path / "run.yaml"))
    assert result.exit_code == 2
    assert "Missing argument 'DATA'" in result.stderr


def test_a_file_of_the_verb_itself_is_taken_whole(tmp_path):
    file = write(tmp_path / "eval.yaml", data="test", batch_size=3, model_name_or_path="m")
    result = run(like_eval, "--config", file, "--json")
    assert json.loads(result.stdout) == {
        "ok": True,
        "data": "test",
        "model": "m",
        "batch_size": 3,
        "max_length": 7,
        "seed": None,
    }
    assert result.stderr == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["check"],
        ["eval", "DATA", "--adapter", "ADAPTER"],
        ["eval", "DATA", "--base", "--metric", "json_valid", "--max-new-tokens", "2", "--limit", "1"],
        ["generate", "--adapter", "ADAPTER", "--prompt", "hello", "--max-new-tokens", "2"],
        ["chat", "--max-new-tokens", "2"],
    ],
)
def test_run_yaml_serves_every_verb(arguments, base, adapter, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", [conversation(i) for i in range(8)])
    settings = TrainConfig(
        model=base, data=data, output=str(tmp_path), dtype="fp32", device="cpu", max_length=60, eval_steps=3
    )
    (tmp_path / "run.yaml").write_text(settings.to_yaml())
    arguments = [{"DATA": data, "ADAPTER": adapter}.get(each, each) for each in arguments]
    result = CliRunner().invoke(main, [*arguments, "--config", str(tmp_path / "run.yaml"), "--json"], input="hello\n")
    assert result.exit_code == 0, result.output
    assert "was written for training; taken from it: " in result.stderr
    assert "error" not in json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lerning_rate": 1}, "unknown key 'lerning_rate'; did you mean learning_rate"),
        ({"lora": {"rang": 8}}, "unknown key 'rang'; did you mean rank"),
        ({"modle": "m"}, "unknown key 'modle'; did you mean model"),
        ({"base_model": "n"}, "'base_model' sets 'model' a second time"),
        ({"seed": "x"}, "'x' is not a valid integer"),
    ],
)
def test_typos_in_it_are_errors(tmp_path, changes, message):
    result = run(like_eval, "test", "--config", run_yaml(tmp_path / "run.yaml", **changes))
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


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
    assert json.loads(result.stdout) == {
        "ok": False, "error": {"type": "DataError", "message": "rows.jsonl:3: [no] messages"}
    }  # fmt: skip


def test_wrong_usage_is_an_object_with_json_too():
    result = run(plain, "rows", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["type"] == "UsageError"
    assert "--model" in result.stderr


def test_interrupt_exits_with_130():
    result = run(failing, "--how", "interrupt")
    assert result.exit_code == 130
    assert "Traceback" not in result.stderr


def test_a_bug_is_an_object_and_a_traceback():
    result = CliRunner().invoke(failing, ["--how", "bug", "--json"])
    assert result.exit_code == 1
    assert isinstance(result.exception, KeyError)  # Python prints it
    assert json.loads(result.stdout) == {"ok": False, "error": {"type": "KeyError", "message": "'x'"}}
    assert CliRunner().invoke(failing, ["--how", "bug"]).stdout == ""


def test_help_is_no_failure():
    result = run(plain, "--help", "--json")
    assert result.exit_code == 0
    assert "error" not in result.stdout


def test_people_read_stderr_and_machines_stdout():
    result = run(made, "rows")
    assert (result.stdout, result.stderr) == ("", "working\n")


def test_emit_is_one_line_of_ascii(capsys):
    emit({"text": "caf\u00e9\nx"}, as_json=True)
    assert capsys.readouterr().out == '{"ok": true, "text": "caf\\u00e9\\nx"}\n'


def test_a_number_that_is_none_is_null(capsys):
    emit({"loss": float("nan"), "all": [1.5, float("inf"), (-float("inf"), {"x": 2})]}, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"ok": True, "loss": None, "all": [1.5, None, [None, {"x": 2}]]}
