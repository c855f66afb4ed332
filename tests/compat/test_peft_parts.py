"""What a module has beside a low-rank update of its one weight, under PEFT's names and beside PEFT: parameters targeted
by name, rows of an embedding, layers with one weight, and a layer's own choice of adapters.
"""

import copy
import warnings

import peft
import pytest
import torch
from torch import nn
from transformers import Llama4ForCausalLM, Llama4TextConfig

import lorakit.compat.peft as facade
from adapter.models import CASES
from core.test_experts import gpt_oss
from lorakit.compat.peft.tuners.lora import LoraLayer, ParamWrapper
from lorakit.compat.peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from tiny_models import SMALL, tiny_llama

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),  # PEFT's, of experts
]
IDS = torch.arange(3, 13).view(2, 5)


def llama4():
    torch.manual_seed(0)
    model = Llama4ForCausalLM(Llama4TextConfig(**SMALL, intermediate_size_mlp=32, num_local_experts=4))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def oss():
    torch.manual_seed(0)
    return gpt_oss().eval()


def adapted(lib, model, **settings):
    config = lib.LoraConfig(**{"r": 2, "init_lora_weights": False, **settings})
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice on tied weights
        return lib.get_peft_model(model, config).eval()


def run(model):
    return model(IDS).logits


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


PARAMETERS = {
    "experts": (oss, ["experts.down_proj", "experts.gate_up_proj"]),
    "one stack": (oss, ["0.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj"]),
    "other experts": (llama4, ["experts.down_proj", "experts.gate_up_proj"]),
    "weights": (oss, ["q_proj.weight", "router.weight"]),
}


@pytest.mark.parametrize("case", PARAMETERS)
def test_parameters_targeted_by_name_are_pefts(case, tmp_path):
    build, targets = PARAMETERS[case]
    ours, theirs = (adapted(lib, build(), target_modules=[], target_parameters=targets) for lib in (facade, peft))
    same(ours.state_dict(), theirs.state_dict())
    same(dict(ours.named_parameters()), dict(theirs.named_parameters()))
    same(facade.get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs))
    assert ours.targeted_parameter_names == theirs.base_model.targeted_parameter_names
    expected = run(theirs)
    torch.testing.assert_close(run(ours), expected, rtol=1e-4, atol=1e-4)
    for model in (ours, theirs):
        run(model).sum().backward()
    gradients = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (ours, theirs)]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-3, atol=1e-3)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    for lib, folder in ((peft, "ours"), (facade, "theirs")):
        loaded = lib.PeftModel.from_pretrained(build(), tmp_path / folder).eval()
        torch.testing.assert_close(run(loaded), expected, rtol=1e-4, atol=1e-4)
    fresh = adapted(facade, build(), target_modules=[], target_parameters=targets)
    fresh.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(run(copy.deepcopy(fresh)), expected, rtol=1e-4, atol=1e-4)
    fresh.merge_adapter()
    torch.testing.assert_close(run(fresh), expected, rtol=1e-3, atol=1e-3)
    status = facade.get_layer_status(fresh), peft.get_layer_status(theirs)
    assert [layer.name for layer in status[0]] == [layer.name for layer in status[1]]
    torch.testing.assert_close(run(fresh.merge_and_unload()), expected, rtol=1e-3, atol=1e-3)


def test_wrappers_of_parameters_have_pefts_attributes():
    model = adapted(facade, oss(), target_modules=[], target_parameters=PARAMETERS["experts"][1])
    theirs = adapted(peft, oss(), target_modules=[], target_parameters=PARAMETERS["experts"][1])
    kind = type(theirs.base_model.model.model.layers[0].mlp.experts)
    wrappers = [m for m in model.modules() if isinstance(m, ParamWrapper)]
    references = [m for m in theirs.modules() if isinstance(m, kind)]
    assert len(wrappers) == len(references) == 4
    by_name = {name: m for name, m in theirs.named_modules() if isinstance(m, kind)}
    for name, wrapper in model.named_modules():
        if not isinstance(wrapper, ParamWrapper):
            continue
        reference = by_name[name]
        for attribute in ("parameter_name", "in_features", "out_features", "r", "scaling", "merged"):
            ours, own = getattr(wrapper, attribute), getattr(reference, attribute)
            assert (dict(ours) if isinstance(own, dict) else ours) == own, attribute
        torch.testing.assert_close(wrapper.get_delta_weight("default"), reference.get_delta_weight("default"))
        assert repr(wrapper).startswith(f"lora.ParamWrapper(\n  parameter_name={wrapper.parameter_name!r}")
    outer = model.base_model.model.model.layers[0].mlp.experts
    assert outer.base_layer.parameter_name == "gate_up_proj"
    outer.base_layer.lora_B["default"].weight.data.zero_()
    assert not outer.base_layer.get_delta_weight("default").any()
    model.add_adapter("other", facade.LoraConfig(target_modules=[], target_parameters=PARAMETERS["experts"][1]))
    assert set(outer.base_layer.lora_A) == {"default", "other"}
    with pytest.raises(ValueError, match="must target the same set of parameters"):
        model.add_adapter("third", facade.LoraConfig(target_modules=[], target_parameters=["experts.down_proj"]))
    model.delete_adapter("other")
    assert set(outer.base_layer.lora_A) == {"default"}
    with pytest.raises(ValueError, match=r"does not support targeting nn\.Parameter"):
        model.base_model.add_weighted_adapter(["default"], [1.0], "sum")


def test_rows_have_experts_of_their_own_where_experts_are_known():
    model = adapted(facade, oss(), target_modules=[], target_parameters=["experts.down_proj"])
    expected = torch.stack([run(model)[0], run(oss())[1]])
    mixed = model(IDS, adapter_names=["default", "__base__"]).logits
    torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-4)
    model = adapted(facade, llama4(), target_modules=[], target_parameters=["experts.down_proj"])
    with pytest.raises(ValueError, match="does not support mixed adapter batches"):
        model(IDS, adapter_names=["default", "__base__"])
    with pytest.raises(ValueError, match="does not work with lora_dropout"):
        model.add_adapter("b", facade.LoraConfig(lora_dropout=0.1, target_parameters=["experts.down_proj"]))


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_the_embedding_are_pefts(tied, tmp_path):
    models = [tiny_llama(tie_word_embeddings=tied) for _ in range(2)]
    asked = {"embed_tokens": [3, 5, 9]}
    settings = {"target_modules": ["q_proj"], "trainable_token_indices": asked}
    ours, theirs = (adapted(lib, model, **settings) for lib, model in zip((facade, peft), models, strict=True))
    same(ours.state_dict(), theirs.state_dict())
    same(dict(ours.named_parameters()), dict(theirs.named_parameters()))
    for model in (ours, theirs):
        torch.manual_seed(2)
        adapter = model.base_model.model.model.embed_tokens.token_adapter
        adapter.trainable_tokens_delta["default"].data.normal_()
    expected = run(theirs)
    torch.testing.assert_close(run(ours), expected, rtol=1e-4, atol=1e-5)
    files = facade.get_peft_model_state_dict(ours)
    same(files, peft.get_peft_model_state_dict(theirs))
    assert sum("token_adapter" in name for name in files) == 1
    embedding, head = ours.base_model.model.model.embed_tokens, ours.base_model.model.lm_head
    assert isinstance(embedding, TrainableTokensWrapper)
    assert isinstance(head, TrainableTokensWrapper) == tied
    assert embedding.token_adapter.token_indices == {"default": [3, 5, 9]}
    if tied:
        assert head.token_adapter.trainable_tokens_delta is embedding.token_adapter.trainable_tokens_delta
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    for lib, folder in ((peft, "ours"), (facade, "theirs")):
        loaded = lib.PeftModel.from_pretrained(tiny_llama(tie_word_embeddings=tied), tmp_path / folder).eval()
        torch.testing.assert_close(run(loaded), expected, rtol=1e-4, atol=1e-5)
    fresh = adapted(facade, tiny_llama(tie_word_embeddings=tied), **settings)
    facade.set_peft_model_state_dict(fresh, files)
    torch.testing.assert_close(run(copy.deepcopy(fresh)), expected, rtol=1e-4, atol=1e-5)
    fresh.add_adapter("other", facade.LoraConfig(**settings))
    with pytest.raises(ValueError, match="are already defined"):
        fresh.merge_and_unload(adapter_names=["default", "other"])
    plain = fresh.merge_and_unload(adapter_names=["default"])
    torch.testing.assert_close(run(plain), expected, rtol=1e-4, atol=1e-5)
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == tied


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainable_token_indices": {"embed_token": [1]}}, "not found in the base model. Did you mean embed_tokens"),
        ({"trainable_token_indices": {"lm_head": [1]}}, "rows of the input embedding"),
        ({"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]}, "either specify|cannot also be"),
        ({"trainable_token_indices": [1], "target_modules": ["embed_tokens"]}, "cannot also be adapted"),
    ],
)
def test_rows_that_cannot_be_trained_are_told(settings, message):
    model = tiny_llama(tie_word_embeddings=False)
    with pytest.raises((ValueError, NotImplementedError), match=message):
        facade.get_peft_model(model, facade.LoraConfig(**{"target_modules": ["q_proj"], **settings}))
    assert type(model.model.embed_tokens) is nn.Embedding


@pytest.mark.parametrize("how", ["target_modules", "modules_to_save"])
def test_tied_layers_stay_tied(how, tmp_path):
    """PEFT's gives each layer a parameter over the same memory; ours is one, stepped once."""
    settings = {"target_modules": ["q_proj"], how: ["q_proj", "lm_head"] if how == "target_modules" else ["lm_head"]}
    model = adapted(facade, tiny_llama(), ensure_weight_tying=True, **settings)
    theirs = adapted(peft, tiny_llama(), ensure_weight_tying=True, **settings)
    assert facade.get_peft_model_state_dict(model).keys() == peft.get_peft_model_state_dict(theirs).keys()
    embedding, head = model.base_model.model.model.embed_tokens, model.base_model.model.lm_head
    kind = LoraLayer if how == "target_modules" else ModulesToSaveWrapper
    assert isinstance(embedding, kind)
    assert isinstance(head, kind)
    before = run(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    before.pow(2).mean().backward()
    optimiser.step()
    after = run(model)
    assert not torch.allclose(after, before)
    if how == "target_modules":
        assert torch.equal(embedding.lora_embedding_A["default"], head.lora_B["default"].weight.T)
    model.save_pretrained(tmp_path)
    loaded = facade.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert torch.equal(run(loaded), after)
    twin = adapted(facade, tiny_llama(), ensure_weight_tying=True, **settings)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(run(twin), after)
    plain = copy.deepcopy(twin).merge_and_unload()
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    torch.testing.assert_close(run(plain), after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["lm_head"]}, "`ensure_weight_tying` is not set to True"),
        ({"target_modules": ["q_proj"], "ensure_weight_tying": True}, "no tied modules are added"),
        ({"target_modules": ["lm_head"], "ensure_weight_tying": True, "tied": False}, "no tied modules were found"),
    ],
)
@pytest.mark.parametrize("lib", [peft, facade], ids=["peft", "facade"])
def test_advice_on_tied_layers_is_given(lib, settings, message):
    settings = dict(settings)
    model = tiny_llama(tie_word_embeddings=settings.pop("tied", True))
    with pytest.warns(UserWarning, match=message):
        lib.get_peft_model(model, lib.LoraConfig(**settings))


@pytest.mark.parametrize("lib", [peft, facade], ids=["peft", "facade"])
def test_a_layer_may_choose_for_itself(lib):
    model = adapted(lib, CASES["llama"].build(), target_modules=["q_proj", "v_proj"])
    model.add_adapter("other", model.peft_config["default"])
    layers = [m for name, m in model.named_modules() if name.endswith(("q_proj", "v_proj"))]
    default, run = CASES["llama"].run(model), CASES["llama"].run
    layers[0].set_adapter("other")
    assert layers[0].active_adapters == ["other"]
    assert layers[0].lora_A["other"].weight.requires_grad
    assert not layers[0].lora_A["default"].weight.requires_grad
    assert not torch.allclose(run(model), default)
    assert model.get_model_status().active_adapters == "irregular"
    model.set_adapter("default")
    assert torch.equal(run(model), default)
    layers[0].enable_adapters(False)
    assert model.get_model_status().enabled == "irregular"
    assert not torch.allclose(run(model), default)
    with pytest.warns(UserWarning, match="some adapter layers that are enabled"), model.disable_adapter():
        pass
    assert torch.equal(run(model), default)
    for layer in layers:
        layer.set_adapter("other")
    chosen = run(model)
    model.merge_adapter()
    torch.testing.assert_close(run(model), chosen, rtol=1e-4, atol=1e-5)


def test_one_adapter_may_train_biases_beside_others():
    model = adapted(facade, CASES["mlp"].build(), target_modules=["first"], bias="all")
    model.add_adapter("plain", facade.LoraConfig(target_modules=["first"]))
    assert any(name.endswith("bias") for name in facade.get_peft_model_state_dict(model))
    files = facade.get_peft_model_state_dict(model, adapter_name="plain")
    assert not any(name.endswith("bias") for name in files)
    facade.set_peft_model_state_dict(model, files, adapter_name="plain")
    with pytest.raises(ValueError, match="only 1 adapter with bias"):
        model.add_adapter("more", facade.LoraConfig(target_modules=["first"], bias="lora_only"))


def test_layers_that_disagree_are_not_merged():
    model = adapted(facade, CASES["llama"].build(), target_modules=["q_proj", "v_proj"])
    next(m for m in model.modules() if isinstance(m, LoraLayer)).enable_adapters(False)
    with pytest.raises(ValueError, match="for some layers alone"):
        model.merge_and_unload()


@pytest.mark.filterwarnings("ignore:FSDP is switching:UserWarning", "ignore:When using ``NO_SHARD``:UserWarning")
def test_one_process_may_be_wrapped_in_fsdp(tmp_path):
    """Names are found there as in PEFT's models; on more processes it is refused, see docs/compat.md."""
    from torch import distributed
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = adapted(facade, tiny_llama(), target_modules=["q_proj"])
    expected, files = run(model), facade.get_peft_model_state_dict(model)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        torch.testing.assert_close(wrapped(IDS).logits, expected)
        same(facade.get_peft_model_state_dict(wrapped), files)
    finally:
        distributed.destroy_process_group()
