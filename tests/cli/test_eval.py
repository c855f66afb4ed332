import json
import shutil

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from lorakit.cli import main
from lorakit.evaluation import evaluate
from tiny_subjects import conversation, write_jsonl


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", [conversation(i) for i in range(5)])


def run(*arguments):
    return CliRunner().invoke(main, ["eval", "--dtype", "fp32", "--device", "cpu", *arguments])


def test_base_and_adapter_as_one_object_each(base, adapter, data, tmp_path):
    answers = tmp_path / "answers.jsonl"
    result = run(
        data, "--model", base, "--adapter", adapter, "--base", "--metric", "loss, bleu", "--metric",
        "exact_match", "--max-new-tokens", "6", "--limit", "4", "--predictions", str(answers), "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout.splitlines()[-1])
    assert (told["model"], told["data"]) == (base, data)
    expected = evaluate(
        model=base, data=data, adapters=[adapter], base=True, metrics=["loss", "bleu", "exact_match"], max_new_tokens=6,
        limit=4, dtype="fp32", device="cpu",
    )  # fmt: skip
    assert [each["adapter"] for each in told["results"]] == [None, adapter]
    for each, evaluation in zip(told["results"], expected, strict=True):
        assert each["rows"] == 4
        assert {metric: each[metric] for metric in evaluation.scores} == evaluation.scores
    written = [json.loads(line) for line in answers.read_text("utf-8").splitlines()]
    assert [row["prediction"] for row in written] == [p.text for e in expected for p in e.predictions]
    assert [row["adapter"] for row in written] == [None] * 4 + [adapter] * 4
    assert written[1]["row"] == f"{data}:2"
    assert written[1]["references"] == ["blue"]


def test_a_single_subject_is_told_at_the_top_too(base, data):
    told = json.loads(run(data, "--model", base, "--json").stdout)
    assert told["results"] == [{key: told[key] for key in told["results"][0]}]
    assert told["adapter"] is None
    assert told["rows"] == 5
    assert told["loss"] > 0


def test_people_read_stderr_and_stdout_stays_empty(base, adapter, data):
    result = run(data, "--adapter", adapter, "--metric", "json_valid", "--max-new-tokens", "2", "--max-length", "20")
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert f"{adapter}  json_valid 0.0%  (5 rows" in result.stderr
    assert "answers did not end within --max-new-tokens 2" in result.stderr
    assert "rows were cut to --max-length" in run(data, "--model", base, "--max-length", "20").stderr


def test_a_loss_that_is_no_number_is_null(base, data, tmp_path):
    broken = shutil.copytree(base, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    result = run(data, "--model", str(broken), "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["loss"] is None
    assert "loss nan" in result.stderr


def test_batch_size_in_the_spelling_of_transformers(base, data):
    flags = [
        "--model_name_or_path",
        base,
        "--metric",
        "json_valid",
        "--max-new-tokens",
        "2",
        "--torch-dtype",
        "float32",
    ]
    result = run(data, *flags, "--per_device_eval_batch_size", "2", "--json")
    assert result.exit_code == 0, result.output
    assert run(data, *flags, "--batch-size", "2", "--json").exit_code == 0
    assert "got 0" in run(data, *flags, "--per_device_eval_batch_size", "0").stderr


def test_settings_from_a_file(base, data, tmp_path):
    (tmp_path / "eval.yaml").write_text(f"model: {base}\nmetric: [json_valid]\nmax_new_tokens: 3\nlimit: 2\n")
    told = json.loads(run(data, "--config", str(tmp_path / "eval.yaml"), "--limit", "1", "--json").stdout)
    assert told["rows"] == 1
    assert "json_valid" in told
    assert "loss" not in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["DATA"], "no model: name one with --model"),
        (["DATA", "--model", "BASE", "--metric", "blue"], "did you mean bleu"),
        (["DATA", "--model", "BASE", "--predictions", "p.jsonl"], "--predictions needs a metric that judges answers"),
        (["DATA", "--model", "no/such/model"], "no such folder or file"),
        (["DATA", "--model", "BASE", "--adapter", "BASE"], "adapter_config.json"),
        (["none.jsonl", "--model", "BASE"], "none.jsonl"),
        (["DATA", "--model", "BASE", "--answer-after", "####"], "exact_match"),
    ],
)
def test_one_clear_error(arguments, message, base, data):
    result = run(*[{"DATA": data, "BASE": base}.get(a, a) for a in arguments], "--json")
    assert result.exit_code == 2
    assert message in json.loads(result.stdout.splitlines()[-1])["error"]["message"]
    assert message in result.stderr
    assert "Traceback" not in result.stderr
