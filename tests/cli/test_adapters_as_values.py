"""`lorakit combine`, `compress` and `inspect`."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

import lorakit
from lorakit import Adapter, LoRAConfig
from lorakit.cli import main
from tiny_models import byte_tokenizer
from tiny_subjects import conversation, save_adapter, write_jsonl


@pytest.fixture(scope="module")
def other(tmp_path_factory, base):
    return save_adapter(tmp_path_factory.mktemp("other"), base, seed=1, tokenizer=byte_tokenizer())


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def told(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


# ---------------------------------------------------------------- combine


def test_combine_writes_what_the_function_makes_with_its_tokenizer(adapter, other, base, tmp_path):
    out = tmp_path / "out"
    result = run("combine", adapter, other, "--weights", "0.7,-0.3", "--output", out, "--json")
    answer = told(result)
    expected = lorakit.combine([adapter, other], [0.7, -0.3])
    assert Adapter.load(out).digest() == expected.digest()
    assert (answer["method"], answer["weights"], answer["error"], answer["ranks"]) == ("cat", [0.7, -0.3], 0.0, [8])
    for name in ("tokenizer_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == Path(adapter, name).read_bytes()
    assert "exact" in result.stderr
    assert f"-0.3  {other}" in result.stderr
    lorakit.attach(lorakit.load_model(base, dtype="fp32", device="cpu")[0], out)


def test_combine_takes_the_options_of_a_method(adapter, other, tmp_path):
    flags = ["--method", "dare-ties", "--rank", "2", "--density", "0.7", "--seed", "5"]
    result = run("combine", adapter, other, *flags, "--output", tmp_path / "out", "--json")
    assert told(result)["relative_error"] > 0
    assert "of the update lost" in result.stderr
    expected = lorakit.combine([adapter, other], None, "dare_ties", rank=2, density=0.7, seed=5)
    assert Adapter.load(tmp_path / "out").digest() == expected.digest()


def test_combine_takes_its_adapters_from_a_file(adapter, other, tmp_path):
    settings = {"adapter": [str(adapter), str(other)], "weights": [0.7, -0.3], "output": str(tmp_path / "out")}
    (tmp_path / "c.yaml").write_text(json.dumps(settings))
    assert told(run("combine", "--config", tmp_path / "c.yaml", "--json"))["weights"] == [0.7, -0.3]


def test_combine_refuses_before_it_writes(adapter, other, tmp_path):
    result = run("combine", adapter, other, "--weights", "1,x", "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert "numbers with commas" in result.stderr
    result = run("combine", adapter, other, "--method", "tise", "--output", tmp_path / "out")
    assert "did you mean ties" in result.stderr
    result = run("combine", adapter, other, "--weights", "1", "--output", tmp_path / "out")
    assert "2 adapters and 1 weights" in result.stderr
    assert not (tmp_path / "out").exists()
    result = run("combine", adapter, other, "--output", adapter)
    assert "something is there already" in result.stderr


def test_tokenizers_that_differ_are_for_the_user_to_choose(adapter, other, tmp_path):
    changed = shutil.copytree(other, tmp_path / "changed")
    (changed / "chat_template.jinja").write_text("{{ messages }}")
    result = run("combine", adapter, changed, "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert "chat templates beside the adapters differ" in result.stderr
    told(run("combine", adapter, changed, "--output", tmp_path / "out", "--tokenizer", changed, "--json"))
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    result = run("combine", adapter, other, "--output", tmp_path / "out2", "--tokenizer", "elsewhere")
    assert "name one of the adapters" in result.stderr


# ---------------------------------------------------------------- compress


@pytest.mark.parametrize(
    ("flag", "value", "settings"), [("--rank", "2", {"rank": 2}), ("--energy", "0.8", {"energy": 0.8})]
)
def test_compress_to_a_size(adapter, flag, value, settings, tmp_path):
    answer = told(run("compress", adapter, flag, value, "--output", tmp_path / "out", "--json"))
    expected = Adapter.load(adapter).compress(**settings)
    assert Adapter.load(tmp_path / "out").digest() == expected.digest()
    assert answer["parameters"] == expected.summary()["parameters"]
    assert 0 < answer["relative_error"] < 1
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_compress_with_data_finds_the_size_and_writes_it(adapter, base, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", [conversation(i) for i in range(6)])
    flags = ["--data", data, "--noise", "1e6", "--dtype", "fp32", "--device", "cpu"]
    result = run("compress", adapter, *flags, "--output", tmp_path / "out", "--json")
    answer = told(result)
    assert answer["search"]["best"]["rank"] == 1  # everything is within a million standard errors
    assert {f.r for f in Adapter.load(tmp_path / "out").factors.values()} == {1}
    assert "smallest within 1e+06 standard errors: rank 1" in result.stderr
    flags[3] = "0"
    result = run("compress", adapter, *flags, "--model", base, "--json")
    answer = told(result)
    assert len(answer["search"]["trials"]) >= 1
    if answer["search"]["best"] is None:
        assert "stays as it is" in result.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give one of --rank, --energy and --data"),
        (["--rank", "2", "--energy", "0.5"], "give one of"),
        (["--rank", "2"], "--output: where"),
    ],
)
def test_compress_says_what_is_missing(adapter, flags, message):
    result = run("compress", adapter, *flags)
    assert result.exit_code == 2
    assert message in result.stderr


# ---------------------------------------------------------------- inspect


@pytest.mark.parametrize("by", ["norm", "energy", "effective_rank", "stable_rank"])
def test_inspect_shows_layers_by_modules(adapter, base, by):
    result = run("inspect", adapter, "--by", by, "--top", "3")
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert f"base     {base}" in lines
    assert "layers   14, rank 4, scaling lora" in lines
    header = next(line for line in lines if "q_proj" in line)
    assert header.split() == ["down_proj", "gate_proj", "up_proj", "k_proj", "o_proj", "q_proj", "v_proj"]
    assert [line.split()[0] for line in lines[lines.index(header) + 1 :][:2]] == ["0", "1"]
    assert sum("%  model.layers" in line for line in lines) == 3


def test_inspect_gives_all_numbers_and_a_page(adapter, tmp_path):
    answer = told(run("inspect", adapter, "--html", tmp_path / "a.html", "--json"))
    spectrum = Adapter.load(adapter).spectrum()
    assert answer["spectrum"] == spectrum.to_dict()
    assert "<svg" in (tmp_path / "a.html").read_text("utf-8")


def test_inspect_says_that_there_are_biases_of_b(base, tmp_path):
    handle = lorakit.attach(
        lorakit.load_model(base, dtype="fp32", device="cpu")[0], LoRAConfig(r=2, lora_bias=True, init="random")
    )
    result = run("inspect", handle.save("default", tmp_path / "a"))
    assert "layers   14, rank 2, scaling lora, with biases of B (lora_bias)" in result.stderr.splitlines()


def test_inspect_of_what_is_no_adapter(tmp_path):
    result = run("inspect", tmp_path / "nothing", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["type"] == "AdapterFileError"
