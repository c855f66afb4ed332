"""Layers that bitsandbytes and torchao have quantised: adapted in place, and given back as they were."""

import copy
import importlib.util
import warnings

import pytest
import torch
from torch import nn

import lorakit
from lorakit import LoRAConfig, models
from lorakit.core.foreign import Foreign
from lorakit.errors import AdapterError, ConfigError, TargetError
from lorakit.generation import generate
from lorakit.quant.tensor import QuantizedTensor, as_dense, format_of
from tiny_models import byte_tokenizer, tiny_llama

KINDS = ["nf4", "fp4", "nested", "int8", "ao-int8", "ao-float8", "ao-intx"]


def library(name):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: pip install {name}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def quantise(model, kind, ao_config=None):
    """As transformers' integrations do it: bitsandbytes replaces layers, torchao their weights. The head stays."""
    if kind.startswith("ao"):
        library("torchao")
        from torchao import quantization as ao

        configs = {
            "ao-int8": "Int8WeightOnlyConfig",
            "ao-float8": "Float8WeightOnlyConfig",
            "ao-intx": "IntxWeightOnlyConfig",
        }
        config = getattr(ao, ao_config or configs[kind])()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ao.quantize_(model, config, filter_fn=lambda m, name: isinstance(m, nn.Linear) and "lm_head" not in name)
        return model
    bnb = library("bitsandbytes")
    for path, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or "lm_head" in path:
            continue
        sizes = (module.in_features, module.out_features)
        if kind == "int8":
            new = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False)
        else:
            settings = {"quant_type": "fp4" if kind == "fp4" else "nf4", "compress_statistics": kind == "nested"}
            new = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.float32, **settings)
            new.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, **settings)
        model.set_submodule(path, new.to("cpu"))
    return model.train()  # outside of it bitsandbytes packs its weights anew on some processors


@pytest.fixture(params=KINDS)
def pair(request):
    """(a quantised Llama, its twin of dense weights)."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1}
    dense = tiny_llama(**sizes)
    model = quantise(copy.deepcopy(dense), request.param)
    foreign = Foreign(model)
    for name, own in model.named_parameters():
        if isinstance(own, QuantizedTensor):
            dense.get_parameter(name).data = as_dense(own)
    foreign.back()
    return model, dense


def state(model):
    return {
        path: (type(m), {name: id(p) for name, p in m._parameters.items()})
        for path, m in model.named_modules(remove_duplicate=False)
    }


def grads(model, settings):
    handle = lorakit.attach(model, LoRAConfig(r=2, **settings), seed=0)
    ids = torch.arange(12).view(2, 6)
    model.train()
    torch.manual_seed(0)
    for parameter in handle.trainable_parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.1)
    loss = model(ids, labels=ids).loss
    loss.backward()
    return handle, loss.detach(), [p.grad for p in handle.trainable_parameters()]


@pytest.mark.parametrize("settings", [{}, {"delta": "dora"}, {"dropout": 1e-9}], ids=str)
def test_it_trains_as_its_dequantised_twin(pair, settings):
    model, dense = pair
    before, ids = state(model), torch.arange(12).view(2, 6)
    with torch.no_grad():
        own = model(ids).logits
    handle, loss, ours = grads(model, settings)
    _, expected, theirs = grads(dense, settings)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    assert handle.base_info().storage.startswith(("bitsandbytes-", "torchao-"))
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, nn.Linear)
    assert layer.weight.shape == (128, 64)
    model.eval()
    with torch.no_grad():
        with handle.disabled():
            torch.testing.assert_close(model(ids).logits, own, rtol=1e-2, atol=1e-2)  # their kernels, ours
        adapted = model(ids).logits
        with handle.merged():
            torch.testing.assert_close(model(ids).logits, adapted, rtol=1e-4, atol=1e-4)
    value = handle.extract()
    with pytest.raises(AdapterError, match="14 of the weights to change are quantised"):
        handle.merge()
    handle.detach()
    assert state(model) == before
    model.train()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, own)
    lorakit.attach(model, value)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, adapted, rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="a base that another library held"):
        models.agreed_storage([value], "any")


def test_their_own_function_gives_the_numbers(pair):
    model, dense = pair
    for path, module in model.named_modules():
        if path.endswith("_proj"):
            kind = type(module).__name__
            if kind == "Linear4bit":
                from bitsandbytes.functional import dequantize_4bit

                numbers = dequantize_4bit(module.weight.data, module.weight.quant_state)
            elif kind == "Linear8bitLt":
                numbers = module.weight.CB.float() * module.weight.SCB.unsqueeze(1) / 127
            else:
                numbers = module.weight.dequantize()
            torch.testing.assert_close(dense.get_parameter(f"{path}.weight"), numbers.float(), rtol=1e-6, atol=1e-7)


def test_their_data_are_shared_and_an_error_changes_nothing(pair):
    model, _ = pair
    before = state(model)
    own = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(TargetError):
        lorakit.attach(model, LoRAConfig(target_modules=["no_such_layer"]))
    assert state(model) == before
    lorakit.attach(model, LoRAConfig(target_modules=["q_proj"]))
    weight = model.model.layers[0].mlp.up_proj.weight  # not adapted, and read by us all the same
    data = own.__tensor_flatten__()[0][0] if format_of(weight).startswith("torchao") else None
    theirs = own.data if data is None else getattr(own, data)
    theirs = own.CB if format_of(weight) == "bitsandbytes-int8" else theirs
    assert weight.parts[0].data_ptr() == theirs.data_ptr()


def test_bf16_and_int8_after_a_first_pass():
    model = quantise(tiny_llama(hidden_size=64, intermediate_size=64).bfloat16(), "int8")
    ids = torch.arange(6).view(1, 6)
    with torch.no_grad():
        model(ids)  # the layer moves its numbers elsewhere
    handle = lorakit.attach(model, LoRAConfig(r=2))
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert all(p.grad is not None for p in handle.trainable_parameters())
    handle.detach()
    with torch.no_grad():
        model(ids)


def test_what_cannot_be_read_is_refused_by_name():
    bnb = library("bitsandbytes")
    narrow = quantise(nn.ModuleDict({"a": nn.Linear(48, 32, bias=False)}), "nf4")
    with pytest.raises(TargetError, match=r"a: rows of 48 columns are not whole blocks of 64"):
        lorakit.attach(narrow, LoRAConfig(target_modules=["a"]))
    for new in (bnb.nn.Linear4bit(64, 32), bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)):
        with pytest.raises(TargetError, match="a: not quantised yet: move the model to its device first"):
            lorakit.attach(nn.ModuleDict({"a": new}), LoRAConfig(target_modules=["a"]))
    wide = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=True)
    with pytest.raises(TargetError, match="has_fp16_weights keeps its weight wide"):
        lorakit.attach(nn.ModuleDict({"a": wide}), LoRAConfig(target_modules=["a"]))
    packed = quantise(nn.ModuleDict({"a": nn.Linear(64, 32, bias=False)}), "nf4")
    packed["a"].weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(
        TargetError, match=r"a: bitsandbytes has packed this weight anew .*; attach before the first pass"
    ):
        lorakit.attach(packed, LoRAConfig(target_modules=["a"]))
    hooked = quantise(nn.ModuleDict({"a": nn.Linear(64, 32, bias=False)}), "nf4")
    hooked["a"].forward = hooked["a"].forward
    with pytest.raises(TargetError, match="forward was replaced on the layer itself"):
        lorakit.attach(hooked, LoRAConfig(target_modules=["a"]))


def test_quantised_activations_are_refused():
    model = quantise(nn.ModuleDict({"a": nn.Linear(64, 32)}), "ao", "Int8DynamicActivationInt8WeightConfig")
    with pytest.raises(TargetError, match="a: torchao quantises the activations of this layer too"):
        lorakit.attach(model, LoRAConfig(target_modules=["a"]))


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao"])
def test_a_model_that_transformers_quantised(kind, tmp_path):
    """`from_pretrained(quantization_config=...)`, a step, an answer."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

    tiny_llama(hidden_size=64, intermediate_size=64, initializer_range=0.1).save_pretrained(tmp_path)
    library("torchao" if kind == "torchao" else "bitsandbytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "torchao":
            from torchao.quantization import Int8WeightOnlyConfig

            config = TorchAoConfig(Int8WeightOnlyConfig())
        else:
            config = BitsAndBytesConfig(load_in_4bit=True) if kind == "nf4" else BitsAndBytesConfig(load_in_8bit=True)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.bfloat16)
    handle = lorakit.attach(model, LoRAConfig(r=2))
    assert isinstance(model.model.layers[0].mlp.up_proj.weight, QuantizedTensor)
    ids = torch.arange(6).view(1, 6)
    model.train()
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in handle.trainable_parameters())
    answers = generate(model.eval(), byte_tokenizer(), [[5, 6, 7]], max_new_tokens=4, stop_ids=frozenset())
    assert len(answers[0].ids) == 4
