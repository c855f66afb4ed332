"""`lorakit targets`: what people read, and what programs do."""

import json
from pathlib import Path

from click.testing import CliRunner
from transformers import AutoModelForCausalLM

import lorakit
from lorakit import LoRAConfig
from lorakit.adapter.config import PRESETS
from lorakit.cli import main


def targets(*arguments):
    return CliRunner().invoke(main, ["targets", *arguments])


def test_tells_what_each_preset_takes(base):
    result = targets("--model", base, "--r", "4", "--target-modules", "attention,embed_tokens", "--json")
    assert result.exit_code == 0, result.stderr
    found = {choice["targets"]: choice for choice in json.loads(result.stdout)["choices"]}
    assert set(found) == {*PRESETS, "attention, embed_tokens"}
    model = AutoModelForCausalLM.from_pretrained(base)
    base_parameters = sum(parameter.numel() for parameter in model.parameters())
    for words in (("attention",), ("attention", "embed_tokens")):
        handle = lorakit.attach(model, LoRAConfig(r=4, target_modules=words))
        trained, choice = handle.summary()["adapters"]["default"], found[", ".join(words)]
        handle.detach()
        assert (choice["layers"], choice["parameters"]) == (trained["layers"], trained["parameters"])
        assert (choice["bytes"], choice["share"]) == (trained["bytes"], trained["parameters"] / base_parameters)
    assert found["mlp"]["target_modules"] == ["gate_proj", "up_proj", "down_proj"]
    assert found["experts"]["problem"]
    lines = result.stderr.splitlines()
    assert lines[0].split()[:2] == ["target_modules", "layers"]
    assert "experts: none here" in lines


def test_needs_no_weights(base, tmp_path):
    (tmp_path / "config.json").write_bytes(Path(base, "config.json").read_bytes())
    assert targets("--model", str(tmp_path)).exit_code == 0


def test_refuses_what_is_not_there(base):
    result = targets("--model", base, "--target-modules", "attention,q_prj")
    assert result.exit_code == 2
    assert "did you mean q_proj" in result.stderr
