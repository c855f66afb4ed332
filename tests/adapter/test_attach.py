"""Attaching, activating, detaching and extracting, over every kind of site."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lorakit
from adapter.models import CASES, Case, llama, randomise, weight_at
from lorakit import LoRAConfig
from lorakit.core.sites import site_of
from lorakit.errors import AdapterError, AdapterMismatchError, LorakitError, TargetError

cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def config(case: Case, **changes) -> LoRAConfig:
    return LoRAConfig(**{"r": 4, "alpha": 8.0, **case.what, **changes})


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_fresh_adapter_changes_nothing_and_detaching_gives_back_every_bit(case, dtype):
    model = case.build(dtype)
    before, state = case.run(model), {k: v.clone() for k, v in model.state_dict().items()}
    classes = {path: type(module) for path, module in model.named_modules()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    handle = lorakit.attach(model, config(case))
    assert torch.equal(case.run(model), before)
    randomise(handle)
    assert not torch.equal(case.run(model), before)
    assert handle.detach() is model
    assert torch.equal(case.run(model), before)
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[k], state[k]) for k in state)
    assert {path: type(module) for path, module in model.named_modules()} == classes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    with pytest.raises(AdapterError, match="has no adapters"):
        lorakit.adapters(model)


@cases
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_the_update_is_that_of_the_dense_product(case, dtype, tolerance):
    """Active adapter = the same model with s B A added to its weights, computed in fp64."""
    model = case.build(dtype)
    handle = lorakit.attach(model, config(case, scaling="rslora"))
    randomise(handle, size=0.1)
    got = case.run(model)
    adapter = handle.extract()
    handle.detach()
    reference = copy.deepcopy(model).double()
    if hasattr(reference, "lm_head"):  # an adapted embedding is not tied to the head any more (peft#2018)
        reference.lm_head.weight = nn.Parameter(reference.lm_head.weight.detach().clone())
    for path in adapter.factors:
        weight, transposed = weight_at(reference, path)
        delta = adapter.delta(path).double()
        weight.data += delta.mT if transposed else delta
    expected = case.run(reference)
    assert (got.double() - expected).norm() / expected.norm() < tolerance


@cases
def test_only_the_adapter_is_trained_and_training_leaves_the_base_as_it_was(case):
    model = case.build()
    before = {name: p.clone() for name, p in model.named_parameters()}
    handle = lorakit.attach(model, config(case, dropout=0.1))
    randomise(handle)
    model.train()
    optimiser = torch.optim.SGD(handle.trainable_parameters(), lr=0.1)
    tensors = {k: v.detach().clone() for k, v in handle.trainable_tensors().items()}
    case.run(model).sin().sum().backward()
    trained = {id(p) for p in handle.trainable_tensors().values()}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in trained), name
        assert (parameter.grad is not None) == (id(parameter) in trained), name
    optimiser.step()
    assert all(not torch.equal(tensors[k], v) for k, v in handle.trainable_tensors().items() if v.grad.any())
    model.eval()
    handle.detach()
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


@cases
def test_extract_and_load_is_exact(case, tmp_path):
    model = case.build()
    handle = lorakit.attach(
        model, config(case, bias="lora_only") if case.some_layer in ("first", "one") else config(case)
    )
    randomise(handle)
    expected = case.run(model)
    handle.save("default", tmp_path / "a")
    value = handle.extract()
    handle.detach()
    for source in (value, tmp_path / "a", str(tmp_path / "a")):
        again = lorakit.attach(model, source, name="again")
        assert torch.equal(case.run(model), expected)
        assert not again.trainable_parameters()
        assert again.extract("again").digest() == value.digest()
        again.detach()


@cases
def test_code_outside_sees_the_layers_it_knows(case):
    model = case.build()
    plain = {path: type(m) for path, m in model.named_modules()}
    names = list(model.state_dict())
    handle = lorakit.attach(model, config(case))
    layer = model.get_submodule(case.some_layer)
    assert isinstance(layer, plain[case.some_layer])
    for name, parameter in layer.named_parameters(recurse=False):
        assert getattr(layer, name) is parameter
    assert [k for k in model.state_dict() if "lorakit_updates" not in k] == names
    assert any(f"{path}.".startswith(f"{case.some_layer}.") for path in handle.extract().factors)


@cases
def test_copies_and_pickles_live_their_own_life(case):
    model = case.build()
    handle = lorakit.attach(model, config(case))
    randomise(handle)
    with_adapter = case.run(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 - our own bytes
        assert torch.equal(case.run(twin), with_adapter)
        lorakit.adapters(twin).activate(None)
        assert not torch.equal(case.run(twin), with_adapter)
        assert torch.equal(case.run(model), with_adapter)
        lorakit.adapters(twin).detach()
        assert type(twin.get_submodule(case.some_layer)) is type(case.build().get_submodule(case.some_layer))


def test_several_active_adapters_add_up_with_their_weights():
    case = CASES["mlp"]
    model = case.build()
    base = case.run(model)
    handle = lorakit.attach(model, config(case, target_modules=("second",)), name="a")
    handle.add("b", config(case, target_modules=("second",), r=2, scaling="rslora"), seed=5)
    randomise(handle, "a")
    randomise(handle, "b")
    alone = {}
    for name in "ab":
        handle.activate(name)
        alone[name] = case.run(model) - base
    handle.activate({"a": 0.7, "b": -0.3})
    assert handle.active == {"a": 0.7, "b": -0.3}
    torch.testing.assert_close(case.run(model), base + 0.7 * alone["a"] - 0.3 * alone["b"])
    handle.activate(["a", "b"])
    torch.testing.assert_close(case.run(model), base + alone["a"] + alone["b"])
    handle.activate(None)
    assert torch.equal(case.run(model), base)


def test_disabled_is_undone_whatever_is_raised():
    case = CASES["llama"]
    model = case.build()
    base = case.run(model)
    handle = lorakit.attach(model, config(case))
    randomise(handle)
    with_adapter = case.run(model)
    with pytest.raises(ZeroDivisionError), handle.disabled():
        raise ZeroDivisionError
    with handle.disabled():
        assert torch.equal(case.run(model), base)
    assert torch.equal(case.run(model), with_adapter)


def test_switching_visits_no_layer(monkeypatch):
    model = CASES["llama"].build()
    handle = lorakit.attach(model, config(CASES["llama"]))
    monkeypatch.setattr(nn.Module, "modules", lambda *_: pytest.fail("walked the model"))
    monkeypatch.setattr(nn.Module, "named_modules", lambda *_: pytest.fail("walked the model"))
    handle.activate(None)
    handle.activate("default")
    with handle.disabled():
        pass


@pytest.mark.parametrize("name", ["train", "eval", "a.b", "0", "layers", "weight", "ä ö", "../x"])
def test_any_name_will_do(name):
    case = CASES["mlp"]
    model = case.build()
    handle = lorakit.attach(model, config(case), name=name)
    handle.add(f"{name}2", config(case))
    assert handle.names == (name, f"{name}2")
    handle.remove(name)
    assert handle.active == {}
    assert handle.names == (f"{name}2",)


def test_removing_an_adapter_leaves_the_other_and_restores_untouched_layers():
    case = CASES["mlp"]
    model = case.build()
    handle = lorakit.attach(model, config(case, target_modules=("first",)), name="a")
    handle.add("b", config(case, target_modules=("second",)))
    handle.remove("a")
    assert type(model.first) is nn.Linear
    assert type(model.second) is not nn.Linear
    assert handle.extract("b").factors.keys() == {"second"}


def test_initial_values_depend_on_seed_and_path_only():
    case = CASES["llama"]
    few = lorakit.attach(case.build(), config(case, target_modules=("v_proj",)), seed=3).extract()
    torch.manual_seed(99)
    many = lorakit.attach(case.build(), config(case), seed=3).extract()
    other = lorakit.attach(case.build(), config(case), seed=4).extract()
    for path, factors in few.factors.items():
        assert torch.equal(factors.A, many.factors[path].A)
        assert not torch.equal(factors.A, other.factors[path].A)


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal"])
def test_initialisations_start_with_no_update_and_are_trainable(init):
    case = CASES["mlp"]
    model = case.build()
    base = case.run(model)
    handle = lorakit.attach(model, config(case, init=init))
    torch.testing.assert_close(case.run(model), base, rtol=1e-5, atol=1e-6)
    case.run(model).sum().backward()
    assert any(p.grad.any() for p in handle.trainable_parameters())


def test_odd_rank_has_no_orthogonal_halves():
    with pytest.raises(LorakitError, match="even"):
        lorakit.attach(CASES["mlp"].build(), LoRAConfig(r=3, init="orthogonal"))


def test_patterns_layers_and_exclusions():
    case = CASES["llama"]
    model = case.build()
    handle = lorakit.attach(
        model,
        config(
            case,
            exclude_modules=("down_proj",),
            layers=(1,),
            rank_pattern={"q_proj": 2},
            alpha_pattern={r"mlp\..*": 1.0},
        ),
    )
    value = handle.extract()
    assert all(".layers.1." in path and "down_proj" not in path for path in value.factors)
    assert len(value.factors) == 6
    assert value.factors["model.layers.1.self_attn.q_proj"].r == 2
    assert value.factors["model.layers.1.mlp.up_proj"].alpha == 1.0
    assert value.factors["model.layers.1.self_attn.v_proj"].alpha == 8.0


def test_all_linear_leaves_the_output_head_out():
    assert "lm_head" not in lorakit.attach(CASES["llama"].build(), LoRAConfig(r=2)).extract().factors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ("q_porj",)}, r"q_porj.*did you mean q_proj"),
        ({"target_modules": ("q_proj", "nonsense")}, r"nonsense"),
        ({"target_modules": "q_proj"}, r"regular expression for whole paths"),
        ({"exclude_modules": ("lm_head",)}, r"exclude_modules 'lm_head'"),
        ({"rank_pattern": {"q_prj": 2}}, r"rank_pattern 'q_prj'.*q_proj"),
        ({"alpha_pattern": {"zzz": 2.0}}, r"alpha_pattern 'zzz'"),
        ({"layers": (0, 7)}, r"\[7\] not among the chosen modules, which have 0 to 1"),
        ({"modules_to_save": ("head",)}, r"modules_to_save 'head'.*lm_head"),
        ({"target_modules": ("self_attn",)}, r"is a block, not a layer.*q_proj"),
        ({"target_modules": ("norm",)}, r"LlamaRMSNorm is no layer lorakit knows"),
        ({"bias": "all"}, r"no such layer has a bias"),
    ],
)
def test_what_matches_nothing_is_an_error_with_the_nearest_name_and_touches_nothing(changes, message):
    model = llama()
    state = list(model.state_dict())
    with pytest.raises(TargetError, match=message):
        lorakit.attach(model, LoRAConfig(r=2, **changes))
    assert list(model.state_dict()) == state
    assert all(p.requires_grad for p in model.parameters())


def test_all_problems_are_told_at_once():
    with pytest.raises(TargetError) as caught:
        lorakit.attach(llama(), LoRAConfig(r=2, target_modules=("q_porj", "vproj"), rank_pattern={"x": 3}))
    assert all(word in str(caught.value) for word in ("q_porj", "vproj", "rank_pattern"))


def test_wrong_names_of_adapters():
    handle = lorakit.attach(CASES["mlp"].build(), LoRAConfig(r=2), name="sql")
    with pytest.raises(AdapterError, match="did you mean 'sql'"):
        handle.activate("sqll")
    with pytest.raises(AdapterError, match="already there"):
        handle.add("sql", LoRAConfig(r=2))
    with pytest.raises(AdapterError, match="finite"):
        handle.activate({"sql": float("nan")})
    with pytest.raises(AdapterError, match="has adapters already"):
        lorakit.attach(handle.model, LoRAConfig(r=2))
    assert handle.active == {"sql": 1.0}


def test_an_adapter_of_another_model_is_refused_with_everything_that_differs(tmp_path):
    value = lorakit.attach(CASES["llama"].build(), LoRAConfig(r=2)).extract()
    other = CASES["llama"].build()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(AdapterMismatchError, match="same shapes, other weights"):
        lorakit.attach(other, value)
    lorakit.attach(other, value, check_base=False).detach()
    with pytest.raises(LorakitError, match="made on a LlamaForCausalLM"):
        lorakit.attach(CASES["mlp"].build(), value)


@pytest.mark.parametrize(("made", "used"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_the_same_base_in_another_dtype_is_the_same_base(made, used):
    value = lorakit.attach(CASES["llama"].build(made), LoRAConfig(r=2)).extract()
    model = CASES["llama"].build(torch.float32 if used is torch.float32 else made).to(used)
    lorakit.attach(model, value)


def test_subclasses_that_multiply_in_their_own_way_are_refused():
    class Doubling(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(Doubling(3, 3), nn.Linear(3, 3))
    assert site_of(model[0]) is None
    with pytest.raises(TargetError, match="Doubling is no layer"):
        lorakit.attach(model, LoRAConfig(r=2, target_modules=("0",)))
    assert lorakit.attach(model, LoRAConfig(r=2)).extract().factors.keys() == {"1"}
    embedding = nn.Sequential(nn.Embedding(5, 3, max_norm=1.0))
    with pytest.raises(TargetError, match="max_norm"):
        lorakit.attach(embedding, LoRAConfig(r=2, target_modules=("0",)))


def test_bf16_base_keeps_the_adapter_in_fp32_and_copies_no_input_to_fp32():
    case = CASES["llama"]
    model = case.build(torch.bfloat16)
    handle = lorakit.attach(model, config(case))
    assert {p.dtype for p in handle.trainable_parameters()} == {torch.float32}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        model.model.layers[0].mlp.up_proj(torch.randn(1, 50, 32, dtype=torch.bfloat16, requires_grad=True))
    wide = [t for t in saved if t.dtype == torch.float32 and t.shape[-2:] == (50, 32)]
    assert not wide
    case.run(model).float().sum().backward()
    assert {p.grad.dtype for p in handle.trainable_parameters()} == {torch.float32}


def test_an_adapter_removed_while_disabled_is_not_active_afterwards():
    handle = lorakit.attach(CASES["mlp"].build(), LoRAConfig(r=2))
    handle.add("other", LoRAConfig(r=2))
    handle.activate(["default", "other"])
    with handle.disabled():
        handle.remove("default")
    assert handle.active == {"other": 1.0}


@pytest.mark.parametrize("name", ["mlp", "llama"])
def test_a_compiled_model_follows_what_is_active(name):
    """The graph is captured and run by autograd's own kernels: what is tested is that capturing sees the adapter."""
    case = CASES[name]
    model = case.build()
    handle = lorakit.attach(model, config(case))
    randomise(handle)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(case.run(compiled), case.run(model))
        with handle.disabled():
            torch.testing.assert_close(case.run(compiled), case.run(model))
        handle.activate({"default": 0.5})
        torch.testing.assert_close(case.run(compiled), case.run(model))


def test_a_copied_model_gives_embeddings_the_same_start():
    """Sites are copied with the model: what a layer is must be seen from its kind, not from which object says so."""
    case = CASES["llama embedding"]
    model = case.build()
    lorakit.attach(model, config(case), name="a")
    copied = copy.deepcopy(model)
    lorakit.adapters(copied).add("b", config(case))
    assert not lorakit.adapters(copied).trainable_tensors("b")["model.embed_tokens.A"].any()
