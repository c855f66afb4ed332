"""An adapter out of two models on disk."""

import json

import pytest
import torch
from click.testing import CliRunner

import lorakit
from adapter.models import CASES, randomise
from lorakit import Adapter, LoRAConfig
from lorakit.cli import main
from lorakit.errors import AdapterError, ModelError
from lorakit.extraction import extract
from tiny_models import tiny_llama


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_merged_adapter_comes_out_again_at_its_rank(name, tmp_path):
    case = CASES[name]
    model = case.build()
    base = saved(model, tmp_path / "base")
    handle = lorakit.attach(model, LoRAConfig(r=3, alpha=5.0, target_modules=case.targets))
    randomise(handle)
    expected, value = case.run(model), handle.extract()
    tuned = saved(handle.merge(), tmp_path / "tuned")
    result = extract(tuned, base, LoRAConfig(r=3, target_modules=case.targets))
    assert not result.left_out
    assert not result.unchanged
    assert result.truncated.relative_error < 1e-5
    for path in value.factors:
        torch.testing.assert_close(result.truncated.adapter.delta(path), value.delta(path), rtol=1e-4, atol=1e-6)
    model = case.build()
    handle = lorakit.attach(model, result.truncated.adapter)
    torch.testing.assert_close(case.run(model), expected, rtol=1e-4, atol=1e-5)
    folder = result.truncated.adapter.save(tmp_path / "adapter")
    assert Adapter.load(folder).digest() == result.truncated.adapter.digest()


def test_the_error_is_what_the_best_approximation_leaves_and_the_rest_is_listed(tmp_path):
    model = tiny_llama()
    base = saved(model, tmp_path / "base")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "layers.1.mlp" not in name:
                tensor.add_(torch.randn_like(tensor) * 0.01)
    tuned = saved(model, tmp_path / "tuned")
    result = extract(tuned, base, LoRAConfig(r=2))
    assert set(result.unchanged) == {f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")}
    after = model.state_dict()
    for path, error in result.truncated.errors.items():
        S = torch.linalg.svdvals((after[f"{path}.weight"] - before[f"{path}.weight"]).double())
        assert error == pytest.approx(float(S[2:].norm()), rel=1e-5)
        assert result.truncated.norms[path] == pytest.approx(float(S.norm()), rel=1e-5)
    norm = "model.layers.0.input_layernorm.weight"
    assert result.left_out[norm] == pytest.approx(
        float((after[norm] - before[norm]).norm() / before[norm].norm()), rel=1e-4
    )
    assert "model.embed_tokens.weight" in result.left_out
    whole = extract(tuned, base, LoRAConfig(r=2, modules_to_save=("norm",)))
    assert torch.equal(whole.truncated.adapter.replaced["model.norm.weight"], after["model.norm.weight"])
    assert "model.norm.weight" not in whole.left_out


def test_models_that_do_not_belong_together_are_refused(tmp_path):
    base = saved(tiny_llama(), tmp_path / "base")
    other = saved(tiny_llama(intermediate_size=24), tmp_path / "other")
    with pytest.raises(AdapterError, match=r"(?s)not of one architecture.*mlp\.down_proj"):
        extract(other, base, LoRAConfig(r=2))
    with pytest.raises(AdapterError, match=r"the same as .* nothing to extract"):
        extract(base, base, LoRAConfig(r=2))
    with pytest.raises(AdapterError, match="leave delta, bias"):
        extract(other, base, LoRAConfig(r=2, delta="dora"))
    with pytest.raises(ModelError, match="no such folder"):
        extract(tmp_path / "none", base, LoRAConfig(r=2))


def test_the_command_writes_an_adapter_and_says_what_is_not_in_it(tmp_path):
    model = tiny_llama()
    base = saved(model, tmp_path / "base")
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.mul_(1.01)
    tuned = saved(model, tmp_path / "tuned")
    arguments = ["extract", str(tuned), "--base", str(base), "--output", str(tmp_path / "a"), "--rank", "2", "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert 0 < told["relative_error"] < 1
    assert "model.norm.weight" in told["left_out"]
    assert "other parameters differ and are not in the adapter" in result.stderr
    assert Adapter.load(tmp_path / "a").config.r == 2
    assert CliRunner().invoke(main, arguments).exit_code != 0  # something is there
