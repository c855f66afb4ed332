"""What PEFT gets wrong, by the number of its issue, and what the facade does instead."""

import json

import huggingface_hub
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorakit.compat.peft as facade
from adapter.models import CASES
from lorakit.errors import AdapterFileError, AdapterMismatchError, LorakitError, TargetError
from tiny_models import tiny_llama

# PEFT reads a name that transformers has deprecated
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer"),  # both say it
]

RUN = CASES["llama"].run


def adapted(adapter="default", **settings):
    config = facade.LoraConfig(**{"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **settings})
    torch.manual_seed(0)
    return facade.get_peft_model(CASES["llama"].build(), config, adapter_name=adapter).eval()


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "v_porj"]},  # peft#1959
        {"modules_to_save": ["lm_haed"]},
        {"rank_pattern": {"q_porj": 2}},
        {"exclude_modules": ["o_porj"]},
    ],
)
def test_1959_a_name_that_matches_nothing_is_an_error_with_the_nearest(settings):
    with pytest.raises(TargetError, match="matches no") as error:
        adapted(**settings)
    assert "proj" in str(error.value) or "lm_head" in str(error.value)
    assert adapted().base_model.targeted_module_names == [
        f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qv"
    ]


@pytest.mark.parametrize("container", [nn.ModuleList, nn.ModuleDict])
def test_a_container_that_is_never_called_cannot_be_trained_whole(container):
    model = nn.Sequential(nn.Linear(3, 3))
    model.more = container([nn.Linear(3, 3)] if container is nn.ModuleList else {"a": nn.Linear(3, 3)})
    with pytest.raises(TargetError, match="never called itself"):
        facade.get_peft_model(model, facade.LoraConfig(target_modules=["0"], modules_to_save=["more"]))


def test_2115_a_key_that_matches_nothing_is_an_error_and_nothing_is_loaded(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = next(iter(tensors))
    wrong = {name.replace("layers.1", "layers.9"): tensor for name, tensor in tensors.items()}
    before = RUN(model)
    with pytest.raises(RuntimeError, match=r"(?s)missing: .*unexpected: .*layers\.9"):
        facade.set_peft_model_state_dict(model, {name: t * 0 for name, t in wrong.items()})
    assert torch.equal(RUN(model), before)
    for change in (wrong, {n: t for n, t in tensors.items() if n != key}, {**tensors, key: tensors[key][:2]}):
        save_file(change, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
        with pytest.raises((RuntimeError, AdapterFileError, AdapterMismatchError)):
            facade.PeftModel.from_pretrained(CASES["llama"].build(), tmp_path)


def test_3761_a_sum_of_rslora_adapters_is_the_sum():
    model = adapted("a", use_rslora=True, r=16, lora_alpha=16)
    model.add_adapter("b", model.peft_config["a"])
    model.add_weighted_adapter(["a", "b"], [1.0, 0.5], "cat", combination_type="cat")
    model.add_weighted_adapter(["a", "b"], [1.0, -0.5], "svd", combination_type="svd", svd_rank=32)
    model.add_weighted_adapter(["a"], [0.5], "one")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    a, b, *combined = (layer.get_delta_weight(name) for name in ("a", "b", "cat", "svd", "one"))
    for found, expected in zip(combined, (a + 0.5 * b, a - 0.5 * b, 0.5 * a), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert layer.r["svd"] == 32
    assert layer.scaling["cat"] == 1.0


def test_a_linear_sum_has_no_cross_terms():
    model = adapted("a", r=8)
    model.add_adapter("b", model.peft_config["a"])
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", combination_type="linear")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    exact = layer.get_delta_weight("a") + layer.get_delta_weight("b")
    best = torch.linalg.svdvals(exact)[8:].norm()  # what rank 8 cannot hold
    assert layer.r["sum"] == 8
    torch.testing.assert_close((layer.get_delta_weight("sum") - exact).norm(), best, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("names", [["default", "default2", "other_default", "efaul"], ["a", "a.b", "lora_A", "weight"]])
def test_3584_names_that_hold_one_another_do_not_mix_in_files(names, tmp_path):
    model = adapted(names[0])
    for name in names[1:]:
        model.add_adapter(name, model.peft_config[names[0]])
    model.save_pretrained(tmp_path)
    outputs = set()
    for name in names:
        model.set_adapter(name)
        folder = tmp_path if name == "default" else tmp_path / name
        loaded = facade.PeftModel.from_pretrained(CASES["llama"].build(), folder)
        torch.testing.assert_close(RUN(loaded), RUN(model), rtol=1e-5, atol=1e-6)
        reference = peft.PeftModel.from_pretrained(CASES["llama"].build(), folder).eval()
        torch.testing.assert_close(RUN(reference), RUN(model), rtol=1e-5, atol=1e-5)
        outputs.add(float(RUN(model).detach().sum()))
    assert len(outputs) == len(names)


@pytest.mark.parametrize("name", ["train", "eval", "keys", "a.b", "forward", "base_model", "0", "weight", "__base"])
def test_an_adapter_may_have_any_name(name, tmp_path):
    model = adapted(name, modules_to_save=["lm_head"])
    assert model.active_adapter == name
    assert model.train() is model
    assert model.eval() is model
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.lora_A[name].weight.shape == (8, 32)
    assert list(layer.scaling) == [name]
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    model.save_pretrained(tmp_path)
    other = facade.PeftModel.from_pretrained(CASES["llama"].build(), tmp_path / name, adapter_name=name)
    torch.testing.assert_close(RUN(other), RUN(model))
    model.merge_adapter()
    model.unmerge_adapter()
    model.delete_adapter(name)


def test_2018_tied_embeddings_are_untied_where_one_of_them_changes():
    model = adapted(target_modules=["embed_tokens"])
    expected, base = RUN(model), CASES["llama"].build()
    assert base.config.tie_word_embeddings
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        merged = model.merge_and_unload()
    torch.testing.assert_close(RUN(merged), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(merged.lm_head.weight, base.lm_head.weight)
    assert not merged.config.tie_word_embeddings


def test_1452_saving_never_asks_the_hub(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    model = facade.get_peft_model(tiny_llama(), facade.LoraConfig(target_modules=["embed_tokens", "q_proj"]))
    model.get_base_model().name_or_path = model.config._name_or_path = "somebody/some-model"
    model.peft_config["default"].base_model_name_or_path = "somebody/some-model"
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "somebody/some-model"
    assert config["inference_mode"] is True


def test_3475_an_exception_in_a_mixed_batch_leaves_no_trace():
    model = adapted("a")
    ids, hooks = torch.tensor([[1, 2, 3], [4, 5, 6]]), []
    expected = model(input_ids=ids).logits

    def fail(*_):
        raise RuntimeError("in the middle")

    handle = model.get_base_model().model.layers[1].register_forward_pre_hook(fail)
    more = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 2, "pad_token_id": 0}
    for call in (model, lambda **kwargs: model.generate(**kwargs, **more)):
        with pytest.raises(RuntimeError, match="in the middle"):
            call(input_ids=ids, adapter_names=["a", "__base__"])
    with pytest.raises(RuntimeError), model.disable_adapter():
        model(input_ids=ids)
    handle.remove()
    for module in model.modules():
        hooks += [*module._forward_pre_hooks, *module._forward_hooks]
    assert not hooks
    assert torch.equal(model(input_ids=ids).logits, expected)
    with pytest.raises(ValueError, match="non-existing adapter"):
        model(input_ids=ids, adapter_names=["a", "b"])
    with pytest.raises(ValueError, match="training mode"):
        model.train()(input_ids=ids, adapter_names=["a", "a"])


def test_a_setting_nobody_knows_is_not_skipped(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "scale_by_seven": True}))
    with pytest.raises(LorakitError, match="scale_by_seven"):
        facade.PeftModel.from_pretrained(CASES["llama"].build(), tmp_path)
    path.write_text(json.dumps({**config, "some_feature_that_is_off": None}))
    facade.PeftModel.from_pretrained(CASES["llama"].build(), tmp_path)


def test_a_merge_that_loses_the_update_is_refused_and_one_for_a_while_is_exact():
    torch.manual_seed(0)
    model = facade.get_peft_model(
        nn.Sequential(nn.Linear(64, 64)).bfloat16(), facade.LoraConfig(target_modules=["0"], init_lora_weights=False)
    )
    model.base_model.model[0].scaling["default"] = 1e-4
    before = model.base_model.model[0].weight.clone()
    with pytest.raises(ValueError, match="would survive rounding"):
        model.merge_and_unload()
    for _ in range(100):
        model.merge_adapter()
        model.unmerge_adapter()
    assert torch.equal(model.base_model.model[0].weight, before)


def test_a_second_model_and_two_biases_are_refused():
    model = adapted()
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter("default", model.peft_config["default"])
    config = facade.LoraConfig(target_modules=["first"], bias="all")
    mlp = facade.get_peft_model(CASES["mlp"].build(), config)
    with pytest.raises(ValueError, match="only 1 adapter with bias"):
        mlp.add_adapter("other", config)
    assert facade.get_layer_status(mlp)[0].available_adapters == ["default"]
    assert facade.get_model_status(mlp).enabled is True
