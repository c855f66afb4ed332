"""The PEFT facade beside PEFT: the same script, the same seed, the same tensors. What PEFT gets wrong is in
test_peft_bugs.py.
"""

import copy
import json
import pickle
import warnings
from types import SimpleNamespace

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

import lorakit.compat.peft as facade
from adapter.models import CASES
from lorakit.compat.peft.tuners.lora import LoraLayer
from lorakit.errors import LorakitError
from tiny_models import tiny_llama

# PEFT reads a name that transformers has deprecated
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer"),  # both say it
]

BOTH = pytest.mark.parametrize("lib", [peft, facade], ids=["peft", "facade"])
NAMES = ["mlp", "embedding", "llama", "llama embedding", "gpt2", "bert", "vit", "torch encoder"]
SETTINGS = {
    "plain": {},
    "patterns": {"use_rslora": True, "lora_alpha": 5, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "random": {"init_lora_weights": False, "lora_dropout": 0.1},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "bias": {"bias": "lora_only"},
    "lora bias": {"lora_bias": True, "lora_alpha": 5},
    "lora bias, random": {"lora_bias": True, "lora_alpha": 5, "init_lora_weights": False},
}


def build(lib, name="llama", setting="plain", adapter="default", **more):
    """The model of a case with a fresh adapter of `lib`; the same for both libraries."""
    model = CASES[name].build()
    targets = {"torch encoder": ["linear1", "self_attn"], "bert": ["query", "value"]}.get(name, CASES[name].targets)
    targets = ["c_attn", "mlp.c_fc"] if name == "gpt2" else ["first", "second"] if name == "mlp" else targets
    targets = list(targets) if isinstance(targets, tuple) else targets
    config = lib.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": targets, **SETTINGS[setting], **more})
    torch.manual_seed(3)
    return quiet(lib.get_peft_model, model, config, adapter_name=adapter)


def quiet(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of GPT-2's transposed layers
        return function(*args, **kwargs)


def same(ours, theirs, rtol=1e-5, atol=1e-6):
    assert list(ours)
    assert set(ours) == set(theirs)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        *((name, setting) for name in NAMES for setting in ("plain", "random")),
        *(("mlp", "bias"), ("bert", "bias")),
        *((name, f"lora bias{more}") for name in ("mlp", "gpt2", "bert", "vit", "llama") for more in ("", ", random")),
    ],
)
def test_names_and_numbers_are_pefts(name, setting):
    ours, next_draw = build(facade, name, setting), torch.rand(3)
    theirs = build(peft, name, setting)
    assert torch.equal(next_draw, torch.rand(3))
    same(ours.state_dict(), theirs.state_dict(), 0, 0)
    same(dict(ours.named_parameters()), dict(theirs.named_parameters()), 0, 0)
    files = facade.get_peft_model_state_dict(ours)
    # PEFT takes a bias of B for a shard of a matrix, and warns
    same(files, quiet(peft.get_peft_model_state_dict, theirs, save_embedding_layers=False), 0, 0)
    trained = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (ours, theirs)]
    assert trained[0] == trained[1]
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    if name == "torch encoder":
        return  # in eval mode torch computes it past PEFT's layers, as if there were no adapter
    ours.eval()
    theirs.eval()
    torch.testing.assert_close(CASES[name].run(ours), CASES[name].run(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["llama", "mlp"])
def test_five_steps_of_training_are_pefts(name, setting):
    if name == "mlp" and setting == "patterns":
        pytest.skip("the patterns name a Llama's layers")
    results = {}
    for lib in (facade, peft):
        model = build(lib, name, setting if (name, setting) != ("llama", "bias") else "plain", lora_dropout=0.0)
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(5):
            loss = CASES[name].run(model).pow(2).mean()
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss.detach())
        results[lib] = losses, {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    torch.testing.assert_close(results[facade][0], results[peft][0], rtol=1e-5, atol=1e-7)
    same(results[facade][1], results[peft][1], 1e-4, 1e-5)


@pytest.mark.parametrize(
    ("name", "setting"),
    [*((name, "random") for name in ("llama", "gpt2", "bert", "embedding")), ("mlp", "lora bias, random")],
)
def test_files_go_both_ways(name, setting, tmp_path):
    task = {"llama": "CAUSAL_LM", "bert": "FEATURE_EXTRACTION"}.get(name)
    for writer, reader in ((facade, peft), (peft, facade)):
        model = build(writer, name, setting, task_type=task).eval()
        quiet(model.save_pretrained, tmp_path / writer.__name__, save_embedding_layers=False)
        loaded = quiet(reader.PeftModel.from_pretrained, CASES[name].build(), tmp_path / writer.__name__).eval()
        assert type(loaded).__name__ == type(model).__name__
        torch.testing.assert_close(CASES[name].run(loaded), CASES[name].run(model), rtol=1e-5, atol=1e-5)
        assert not any(p.requires_grad for p in loaded.parameters())
    configs = [json.loads((tmp_path / lib.__name__ / "adapter_config.json").read_text()) for lib in (facade, peft)]
    free = {"target_modules", "peft_version", "fan_in_fan_out"}  # PEFT sets the last to what it finds
    assert not {key for key in configs[1] if configs[0].get(key) != configs[1][key]} - free
    targets = [config["target_modules"] for config in configs]
    assert set(targets[0]) == set(targets[1]) or name == "llama"  # "all-linear", which PEFT replaces by what it found


@pytest.mark.parametrize("beams", [1, 3])
def test_a_mixed_batch_is_pefts(beams):
    ids = torch.randint(3, 90, (4, 5), generator=torch.Generator().manual_seed(0))
    names, outputs, texts = ["a", "__base__", "b", "a"], {}, {}
    for lib in (facade, peft):
        model = build(lib, setting="random", adapter="a").eval()
        model.add_adapter("b", model.peft_config["a"])
        model.eval()  # PEFT's second adapter drops elements out until it is told again
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.mul_(3)
        with torch.no_grad():
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
            outputs[lib] = model(input_ids=ids, adapter_names=names).logits
            texts[lib] = model.generate(**inputs, adapter_names=names, num_beams=beams, max_new_tokens=4)
    torch.testing.assert_close(outputs[facade], outputs[peft], rtol=1e-4, atol=1e-5)
    assert torch.equal(texts[facade], texts[peft])
    with pytest.raises(ValueError, match="Length of"):
        build(facade, adapter="a").eval()(input_ids=ids, adapter_names=["a"])


def test_an_encoder_sees_each_prompt_of_a_mixed_batch_once():
    outputs = []
    for lib in (facade, peft):
        torch.manual_seed(0)
        config = T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, vocab_size=40, initializer_factor=8.0)
        model = T5ForConditionalGeneration(config)
        model.generation_config.decoder_start_token_id = 0
        settings = lib.LoraConfig(r=4, init_lora_weights=False, task_type="SEQ_2_SEQ_LM")
        model = lib.get_peft_model(model, settings).eval()
        ids = torch.randint(2, 40, (3, 6), generator=torch.Generator().manual_seed(1))
        asked = {"adapter_names": ["default", "__base__", "default"], "num_beams": 2, "max_new_tokens": 5}
        outputs.append(model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **asked))
    assert torch.equal(*outputs)


def test_merging_is_pefts_and_unmerging_gives_the_bits_back():
    ours, theirs = build(facade, setting="random").eval(), build(peft, setting="random").eval()
    before = {name: tensor.clone() for name, tensor in ours.get_base_model().state_dict().items()}
    active, run = CASES["llama"].run(ours), CASES["llama"].run
    ours.merge_adapter()
    with pytest.warns(UserWarning, match="nothing to do"):
        ours.merge_adapter()
    theirs.merge_adapter()
    layer = ours.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.merged
    assert layer.merged_adapters == ["default"]
    torch.testing.assert_close(run(ours), active, rtol=1e-4, atol=1e-5)
    same(ours.state_dict(), theirs.state_dict(), 1e-5, 1e-6)
    with ours.disable_adapter():
        assert torch.equal(run(ours), run(CASES["llama"].build()))
    assert layer.merged
    ours.unmerge_adapter()
    assert not layer.merged
    same(ours.get_base_model().state_dict(), before, 0, 0)
    plain, reference = ours.merge_and_unload(), quiet(theirs.merge_and_unload)
    assert type(plain.model.layers[0].self_attn.q_proj) is nn.Linear
    assert not hasattr(plain, "peft_config")
    same(plain.state_dict(), reference.state_dict(), 1e-5, 1e-6)


def test_a_bias_of_b_is_merged_into_a_bias_and_nowhere_else():
    ours, theirs = (build(lib, "gpt2", "lora bias, random").eval() for lib in (facade, peft))
    before = {name: tensor.clone() for name, tensor in ours.get_base_model().state_dict().items()}
    active = CASES["gpt2"].run(ours)
    ours.merge_adapter()
    theirs.merge_adapter()
    same(ours.state_dict(), theirs.state_dict(), 1e-5, 1e-6)
    torch.testing.assert_close(CASES["gpt2"].run(ours), active, rtol=1e-4, atol=1e-5)
    ours.unmerge_adapter()
    same(ours.get_base_model().state_dict(), before, 0, 0)
    layer = ours.base_model.model.transformer.h[0].attn.c_attn
    bias, own, whole = layer.lora_B["default"].bias, layer.bias.clone(), layer.lora_B["default"].bias.detach().clone()
    with torch.no_grad():
        bias[0] = torch.inf
        for call in (ours.merge_adapter, ours.merge_and_unload):
            with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default seems"):
                call()
            assert torch.equal(layer.bias, own)
        bias.copy_(whole)
    same(ours.merge_and_unload().state_dict(), quiet(theirs.merge_and_unload).state_dict(), 1e-5, 1e-6)
    config = facade.LoraConfig(target_modules=["first", "second"], lora_bias=True, init_lora_weights=False)
    with pytest.warns(facade.PeftWarning, match="`lora_bias=True` was passed but the targeted layer of type Linear"):
        model = facade.get_peft_model(CASES["mlp"].build(), config)
    active = CASES["mlp"].run(model)
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(RuntimeError, match=r"(?s)because the base layer has no bias: .*second\n"):
            call()
        assert torch.equal(CASES["mlp"].run(model), active)


def test_a_weighted_sum_has_the_biases_of_b_in_it():
    """PEFT's has not: add_weighted_adapter leaves lora_B.bias as it is in a fresh adapter."""
    model = build(facade, "gpt2", "lora bias, random", "a").eval()
    model.add_adapter("b", facade.LoraConfig(r=4, target_modules=["c_attn"], lora_bias=True, init_lora_weights=False))
    run, outputs = CASES["gpt2"].run, []
    model.eval()
    for kind in ("cat", "linear", "svd"):
        model.base_model.add_weighted_adapter(["a", "b"], [0.7, 0.4], kind, combination_type=kind, svd_rank=8)
        model.set_adapter(kind)
        outputs.append(run(model))
    handle = model.base_model.handle
    handle.activate({"a": 0.7, "b": 0.4})
    for output in outputs:
        torch.testing.assert_close(output, run(model), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"ties: adapter 1 .*lora_bias"):
        model.base_model.add_weighted_adapter(["a", "b"], [0.7, 0.4], "ties", combination_type="ties")


def test_merging_what_is_not_finite_names_the_adapter_and_changes_nothing():
    model = build(facade, "mlp", "random")
    model.add_adapter("good", model.peft_config["default"])
    model.base_model.model.first.lora_B["default"].weight.data[0] = torch.inf
    before = model.base_model.model.first.weight.clone()
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default seems"):
            call(adapter_names=["good", "default"])
    assert torch.equal(model.base_model.model.first.weight, before)
    model.merge_adapter(["good"])


def test_layers_have_pefts_attributes_over_our_tensors():
    model = build(facade, "mlp", "random")
    layer = model.base_model.model.first
    theirs = build(peft, "mlp", "random").base_model.model.first
    assert isinstance(layer, LoraLayer)
    assert isinstance(layer, nn.Linear)
    for name in (
        *("scaling", "r", "lora_alpha", "use_rslora", "use_dora", "lora_bias"),
        *("in_features", "active_adapters", "merged"),
    ):
        ours, reference = getattr(layer, name), getattr(theirs, name)
        assert (dict(ours) if isinstance(reference, dict) else ours) == reference, name
    torch.testing.assert_close(layer.get_delta_weight("default"), theirs.get_delta_weight("default"))
    x = torch.randn(2, 12)
    assert torch.equal(layer.base_layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    layer.scale_layer(3)
    layer.set_scale("default", 2)
    assert layer.scaling["default"] == 4.0
    layer.unscale_layer()
    assert layer.scaling["default"] == 2.0
    assert layer.lora_A is layer.lora_A
    layer.lora_B["default"].weight = nn.Parameter(torch.zeros(20, 4))  # given to the view, used by the layer
    layer.lora_dropout["default"].p = 0.5
    assert torch.equal(layer(x), layer.base_layer(x))
    assert "dropout=0.5" in repr(layer.loras()["default"])
    with pytest.raises(TypeError, match="cannot be set"):
        layer.r["default"] = 8
    layer = build(facade, "mlp", "lora bias").base_model.model.first
    assert dict(layer.lora_bias) == {"default": True}
    assert "bias=True" in repr(layer.lora_B["default"])
    layer.lora_B["default"].bias = nn.Parameter(torch.ones(20))
    assert layer.lora_A["default"].bias is None
    torch.testing.assert_close(layer(x) - layer.base_layer(x), torch.full((2, 20), layer.scaling["default"]))


@BOTH
def test_adapters_are_added_activated_switched_off_and_deleted(lib, tmp_path):
    model = build(lib, setting="random").eval()
    run = CASES["llama"].run
    first = run(model)
    model.add_adapter("other", model.peft_config["default"])
    model.eval()
    assert model.active_adapter == "default"
    assert torch.equal(run(model), first)
    model.set_adapter("other")
    assert model.active_adapters == ["other"]
    assert not torch.allclose(run(model), first)
    trained = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"other"}
    with model.disable_adapter():
        assert torch.equal(run(model), run(CASES["llama"].build()))
        assert not model.has_active_enabled_adapter
    model.base_model.set_adapter(["default", "other"])
    both = run(model)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "other" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "README.md").is_file()
    model.set_adapter("other")
    with pytest.warns(UserWarning, match="Setting active adapter"):
        model.delete_adapter("other")
    torch.testing.assert_close(run(model), first)
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("other")
    model.load_adapter(tmp_path / "other", "again")
    model.base_model.set_adapter(["default", "again"])
    torch.testing.assert_close(run(model), both)


@BOTH
def test_a_task_trains_its_head(lib):
    torch.manual_seed(0)
    model = CASES["vit"].build()
    model.config.problem_type = None
    config = lib.LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS", r=2)
    wrapped = lib.get_peft_model(model, config)
    assert type(wrapped).__name__ == "PeftModelForSequenceClassification"
    names = {name for name, p in wrapped.named_parameters() if p.requires_grad and "lora_" not in name}
    assert names == {f"base_model.model.classifier.modules_to_save.default.{n}" for n in ("weight", "bias")}


def test_an_adapter_comes_with_its_base(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = facade.get_peft_model(base, facade.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = facade.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[1, 2, 3]])
    assert isinstance(loaded, facade.PeftModelForCausalLM)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="SEQ_CLS"):
        facade.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")


def test_without_a_task_the_base_is_of_its_own_class(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = facade.get_peft_model(base, facade.LoraConfig(init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = facade.AutoPeftModel.from_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"auto_mapping": {"base_model_class": "system", "parent_library": "os"}}))
    with pytest.raises(ValueError, match="not transformers'"):
        facade.AutoPeftModel.from_pretrained(tmp_path / "adapter")


def test_copies_pickles_and_state_dicts_are_whole():
    model = build(facade, "torch encoder", "random").eval()
    expected, run = CASES["torch encoder"].run(model), CASES["torch encoder"].run
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 - what is promised
        torch.testing.assert_close(run(twin), expected)
        twin.add_adapter("more", twin.peft_config["default"])
        assert set(model.peft_config) == {"default"}
    fresh = build(facade, "torch encoder").eval()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(run(fresh), expected)
    injected = facade.inject_adapter_in_model(
        facade.LoraConfig(r=4, lora_alpha=8),
        CASES["torch encoder"].build(),
        low_cpu_mem_usage=True,
        state_dict=facade.get_peft_model_state_dict(model),
    )
    facade.set_peft_model_state_dict(injected, facade.get_peft_model_state_dict(model.base_model.model))
    torch.testing.assert_close(run(injected.eval()), expected)
    same(facade.get_base_model_state_dict(model), CASES["torch encoder"].build().state_dict(), 0, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_lora_weights": "corda", "layer_replication": [(0, 1)]}, "(?s)layer_replication.*corda"),
        ({"init_lora_weights": "pissa", "lora_bias": True}, "lora_bias=True is only supported with .*pissa"),
        ({"use_dora": True, "lora_bias": True}, "lora_bias=True is not supported for DoRA"),
        ({"r": 0}, "positive"),
        ({"task_type": "NOTHING"}, "Invalid task type"),
        ({"bias": "some"}, "Requested bias: some"),
        ({"layers_pattern": "layers"}, "layers_to_transform"),
    ],
)
def test_what_is_not_here_is_refused_by_name_and_leaves_no_trace(settings, message):
    model = CASES["mlp"].build()
    with pytest.raises((ValueError, LorakitError), match=message):
        facade.get_peft_model(model, facade.LoraConfig(**{"target_modules": ["first"], **settings}))
    assert type(model.first) is nn.Linear
    assert not hasattr(model, "peft_config")
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="has LoRA"):
        facade.get_peft_model(model, SimpleNamespace(task_type=None))


@pytest.mark.parametrize("init", ["olora", "pissa", "pissa_niter_4"])
def test_what_begins_as_a_part_of_the_weight_leaves_the_base_alone_and_is_saved_for_it(init, tmp_path):
    ours = build(facade, init_lora_weights=init)
    next_draw = torch.rand(3)
    theirs = build(peft, init_lora_weights=init)
    if "niter" not in init:  # whose decomposition draws too
        assert torch.equal(next_draw, torch.rand(3))
    case = CASES["llama"]
    base = case.build()
    assert torch.equal(case.run(ours), case.run(base))
    torch.testing.assert_close(case.run(theirs), case.run(base), rtol=1e-4, atol=1e-4)
    pristine = base.state_dict()
    assert all(torch.equal(t, pristine[name]) for name, t in facade.get_base_model_state_dict(ours).items())
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    ours.save_pretrained(tmp_path, path_initial_model_for_weight_conversion="not needed")
    for lib in (peft, facade):
        torch.testing.assert_close(
            case.run(lib.PeftModel.from_pretrained(case.build(), tmp_path)), case.run(ours), rtol=1e-4, atol=1e-5
        )
    with pytest.raises(LorakitError, match="save_pretrained writes the adapter, as a plain one of twice the rank"):
        facade.get_peft_model_state_dict(ours)
