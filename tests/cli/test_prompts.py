"""Soft prompts on the command line: trained, measured, asked, merged, told of, and refused by name."""

import json

import pytest
from click.testing import CliRunner

from lorakit.adapter.value import Adapter
from lorakit.cli import main
from tiny_runs import save_base, save_data


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(base, training file, validation file)."""
    train, valid = save_data(tmp_path_factory.mktemp("data"))
    return str(save_base(tmp_path_factory.mktemp("base"))), str(train), str(valid)


def run(*arguments, code=0, **options):
    result = CliRunner().invoke(main, [*map(str, arguments)], **options)
    assert result.exit_code == code, result.stderr
    return result


def told(*arguments, **options):
    return json.loads(run(*arguments, "--json", **options).stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory):
    """kind -> what training one said: a prompt alone, a prefix with LoRA."""
    base, train, valid = files
    folder = tmp_path_factory.mktemp("runs")
    common = (train, "--model", base, "--valid", valid, "--dtype", "fp32", "--device", "cpu", "--max-steps", "6")
    common += ("--lr", "5e-3", "--samples", "1", "--soft-prompt")
    return {
        "alone": told(
            *("train", *common, "prompt", "--target-modules", "none", "--prompt-text", "colours: "),
            *("--num-virtual-tokens", 8, "--prompt-lr-ratio", 3, "--output", folder / "alone"),
        ),
        "both": told("train", *common, "prefix-tuning", "--virtual-tokens", 6, "--output", folder / "both"),
    }


@pytest.mark.parametrize("kind", ["alone", "both"])
def test_from_training_to_answers(kind, trained, files, tmp_path):
    base, _, valid = files
    adapter = trained[kind]["adapter"]
    assert trained[kind]["virtual_tokens"] == {"alone": 8, "both": 6}[kind]
    assert trained[kind]["adapted_layers"] == {"alone": 0, "both": 14}[kind]
    scores = told("eval", valid, "--adapter", adapter, "--base", "--dtype", "fp32", "--metric", "loss,exact_match")
    assert scores["results"][0]["loss"] == pytest.approx(trained[kind]["initial_loss"], rel=1e-5)
    assert scores["results"][1]["loss"] == pytest.approx(trained[kind]["best_loss"], rel=1e-5)
    asked = told("generate", "--adapter", adapter, "--dtype", "fp32", "--prompt", "1: red?", "--max-new-tokens", 6)
    (answer,) = asked["completions"]
    talked = told("chat", "--adapter", adapter, "--dtype", "fp32", "--max-new-tokens", 6, input="1: red?\n")
    assert talked["messages"][-1]["content"] == answer["text"]
    looked = run("inspect", adapter, "--html", tmp_path / "page.html").stderr
    assert f"{trained[kind]['virtual_tokens']} virtual tokens" in looked
    assert "Virtual tokens" in (tmp_path / "page.html").read_text()
    about = told("inspect", adapter)
    assert about["soft_prompt"] == {"alone": "prompt", "both": "prefix"}[kind]
    assert about["base"] == base


def test_what_training_says(files, tmp_path):
    base, train, valid = files
    common = ("train", train, "--model", base, "--valid", valid, "--dtype", "fp32", "--max-steps", 2, "--samples", 0)
    alone = run(*common, "--soft-prompt", "prefix", "--target-modules", "none", "--output", tmp_path / "a").stderr
    assert "fp32 on cpu; 20 virtual tokens: 1.28K trained" in alone
    assert "lorakit merge" not in alone
    both = run(*common, "--soft-prompt", "prompt", "--output", tmp_path / "b").stderr
    assert "14 layers adapted, r=8, 20 virtual tokens:" in both
    assert "lorakit merge" in both


def test_the_two_parts_merge_apart(trained, files, tmp_path):
    _, _, valid = files
    adapter, merged = trained["both"]["adapter"], tmp_path / "merged"
    result = run("merge", "--adapter", adapter, "--output", merged, "--json")
    assert f"prompt the soft prompt is no part of weights and stays an adapter: {merged}/prompt" in result.stderr
    assert f"lorakit chat --model {merged} --adapter {merged}/prompt" in result.stderr
    assert json.loads(result.stdout)["prompt"] == f"{merged}/prompt"
    kept = Adapter.load(merged / "prompt")
    assert kept.digest() == Adapter.load(adapter).prompt_alone().digest()
    # the base that the prompt names is the merged model
    of_parts = told("eval", valid, "--adapter", merged / "prompt", "--dtype", "fp32")
    assert of_parts["loss"] == pytest.approx(trained["both"]["best_loss"], rel=1e-4)
    alone = run("merge", "--adapter", trained["alone"]["adapter"], "--output", tmp_path / "x", code=2).stderr
    assert "the adapter is a soft prompt alone (8 virtual tokens (prompt)), which is no part of weights" in alone
    together = run(
        *("merge", "--adapter", adapter, "--adapter", trained["alone"]["adapter"], "--output", tmp_path / "y"), code=2
    ).stderr
    assert "two adapters have a soft prompt" in together


def test_other_verbs_handle_it_or_name_it(trained, tmp_path):
    alone, both = (trained[kind]["adapter"] for kind in ("alone", "both"))
    run("convert", both, "--to", "peft", "--output", tmp_path / "copy")
    assert Adapter.load(tmp_path / "copy").digest() == Adapter.load(both).digest()
    assert (tmp_path / "copy" / "tokenizer.json").is_file()
    told_so = run("convert", both, "--to", "gguf", "--output", tmp_path / "x.gguf", code=2).stderr
    assert "a soft prompt, 6 virtual tokens (prefix), which llama.cpp does not read" in told_so
    assert "a soft prompt" in run("export", "--adapter", alone, "--to", "vllm", "--lint", code=2).stderr
    assert (
        "combine: works on changes of weights" in run("combine", both, both, "--output", tmp_path / "z", code=2).stderr
    )
    run("compress", both, "--rank", 2, "--output", tmp_path / "small")
    small = Adapter.load(tmp_path / "small")
    assert (small.summary()["ranks"], small.prompt.length) == ([2], 6)
    assert "only a soft prompt" in run("compress", alone, "--rank", 2, "--output", tmp_path / "w", code=2).stderr


def test_planned_and_compared(files, tmp_path):
    base, train, valid = files
    plan = told(
        "plan", train, "--model", base, "--soft-prompt", "prefix", "--target-modules", "none", "--steps-timed", 1
    )
    assert (plan["trained"], plan["adapter_bytes"]) == (20 * 64, 4 * 20 * 64)
    compared = told(
        *("compare", train, "--model", base, "--valid", valid, "--output", tmp_path / "c"),
        *("--methods", "prefix:virtual_tokens=3,lora_prompt", "--rates", "1e-3", "--seeds", 1),
        *("--set", "max_steps=2", "--set", "samples=0"),
    )
    assert min(method["trained"] for method in compared["methods"]) == 3 * 64


def test_settings_in_a_file(files, tmp_path):
    base, train, _ = files
    written = tmp_path / "run.yaml"
    written.write_text(
        f"model: {base}\nprompt:\n  soft_prompt: prefix\n  virtual_tokens: 4\nlora:\n  target_modules: none\n"
    )
    plan = told("plan", train, "--config", written, "--steps-timed", 0)
    assert plan["trained"] == 4 * 64
    wrong = run("train", train, "--model", base, "--soft-prompt", "promt", code=2).stderr
    assert "soft" in wrong
    wrong = run("train", train, "--model", base, "--virtual-tokens", 4, code=2).stderr
    assert "virtual_tokens: has no meaning without soft_prompt" in wrong
