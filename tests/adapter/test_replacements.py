"""Trained biases and modules_to_save: whole tensors held by the adapter, the base untouched."""

import pytest
import torch
from torch import nn

import lorakit
from adapter.models import CASES, randomise
from lorakit import LoRAConfig
from lorakit.errors import AdapterError, TargetError


def classifier() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 8))
    model.head = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    return model


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_biases_belong_to_the_adapter(bias, tmp_path):
    case = CASES["mlp"]
    model = case.build()
    base = case.run(model)
    handle = lorakit.attach(model, LoRAConfig(r=2, bias=bias))
    assert torch.equal(case.run(model), base)
    names = [n for n in handle.trainable_tensors() if n.endswith(".bias")]
    assert names == ["first.bias"] + (["norm.bias"] if bias == "all" else [])
    randomise(handle)
    changed = case.run(model)
    value = handle.extract()
    reference = case.build()
    for path, trained in value.biases.items():
        reference.get_submodule(path).bias.data = trained
    for path in value.factors:
        reference.get_submodule(path).weight.data += value.delta(path)
    torch.testing.assert_close(changed, case.run(reference), rtol=1e-4, atol=1e-5)
    handle.save("default", tmp_path / "a")
    assert torch.equal(case.run(handle.detach()), base)
    lorakit.attach(model, tmp_path / "a")
    torch.testing.assert_close(case.run(model), changed, rtol=0, atol=0)


def test_a_module_to_save_is_trained_whole_buffers_included(tmp_path):
    model = classifier()
    x = torch.randn(16, 6)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    handle = lorakit.attach(model, LoRAConfig(r=2, target_modules=("body.0", "body.3"), modules_to_save=("head",)))
    assert {n for n in handle.trainable_tensors() if n.startswith("head")} == {
        *("head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias", "head.2.weight", "head.2.bias")
    }
    model.train()
    model.body[2].eval()  # the frozen body's batch norm keeps its statistics
    optimiser = torch.optim.SGD(handle.trainable_parameters(), lr=0.1)
    for _ in range(3):
        model(x).pow(2).mean().backward()
        optimiser.step()
    model.eval()
    trained = model(x)
    handle.save("default", tmp_path / "a")
    with handle.disabled():
        plain = model(x)
    handle.detach()
    assert torch.equal(model(x), plain)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    again = lorakit.attach(model, tmp_path / "a")
    assert torch.equal(model(x), trained)
    assert int(again.extract().replaced["head.1.num_batches_tracked"]) == 3


def test_weights_interpolate_from_the_base():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    x, w0 = torch.randn(5, 4), model[1].weight.detach().clone()
    handle = lorakit.attach(model, LoRAConfig(r=2, target_modules=("0",), modules_to_save=("1",)), name="a")
    handle.add("b", LoRAConfig(r=2, target_modules=("0",), modules_to_save=("1",)), seed=1)
    with torch.no_grad():
        for name in "ab":
            handle.trainable_tensors(name)["1.weight"].normal_()
    wa, wb = (handle.trainable_tensors(n)["1.weight"].detach() for n in "ab")
    handle.activate({"a": 0.25, "b": 0.5})
    expected = nn.functional.linear(model[0](x), w0 + 0.25 * (wa - w0) + 0.5 * (wb - w0), model[1].bias)
    torch.testing.assert_close(model(x), expected)


def test_a_second_adapter_copies_the_base_and_not_the_first(tmp_path):
    model = classifier()
    config = LoRAConfig(r=2, target_modules=("body.0",), modules_to_save=("head",))
    handle = lorakit.attach(model, config, name="a")
    randomise(handle, "a")
    handle.add("b", config)
    assert handle.trainable_tensors("b").keys() == handle.trainable_tensors("a").keys()
    value = handle.extract("a")
    assert value.replaced.keys() == handle.extract("b").replaced.keys()
    handle.load(value, "again")
    x = torch.randn(4, 6)
    handle.activate("a")
    expected = model.eval()(x)
    handle.activate("again")
    assert torch.equal(model(x), expected)


def test_one_module_cannot_be_trained_whole_and_by_low_rank():
    handle = lorakit.attach(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), LoRAConfig(r=2), name="low rank")
    with pytest.raises(TargetError, match="trained whole"):
        handle.add("whole", LoRAConfig(r=2, target_modules=("0",), modules_to_save=("1",)))
    assert handle.names == ("low rank",)


def test_whole_tensors_cannot_be_scaled_as_a_value():
    model = CASES["mlp"].build()
    with pytest.raises(AdapterError, match="activate it with a weight"):
        lorakit.attach(model, LoRAConfig(r=2, bias="lora_only")).extract().scaled(2.0)
    randomised = lorakit.attach(CASES["mlp"].build(), LoRAConfig(r=2))
    randomise(randomised)
    value = randomised.extract()
    torch.testing.assert_close(value.scaled(-1.5).delta("second"), -1.5 * value.delta("second"))
