"""Adapters that begin from the weight or from data, over every kind of site: the base stays as it is, the function too,
values and PEFT's files mean the same.
"""

import copy
import json
import math

import peft
import pytest
import torch

import lorakit
from adapter.models import CASES, randomise, weight_at
from lorakit import Adapter, LoRAConfig
from lorakit.adapter.began import BEGAN, residual_form
from lorakit.adapter.blank import blank_adapter
from lorakit.errors import AdapterError, AdapterFileError, ConfigError, TargetError
from lorakit.formats.peft import CONFIG_FILE
from tiny_models import tiny_llama

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings(
        "ignore:(PiSSA|OLoRA) changes the base weights:UserWarning"
    ),  # PEFT's, which are its own
]
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
FROM_WEIGHT = ["olora", "pissa", "pissa_niter_4"]


def config(case, **changes):
    return LoRAConfig(**{"r": 2, "alpha": 5.0, **case.what, **changes})


def moved(handle, name="default", size=0.1):
    """Move its factors as training would."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in handle.trainable_tensors(name).values():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * size)


def relative(got, expected):
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm().clamp(min=1e-300))


# ---------------------------------------------------------------- from the weight, in a model


@cases
@pytest.mark.parametrize("init", FROM_WEIGHT)
@pytest.mark.parametrize("scaling", ["lora", "rslora"])
def test_nothing_changes_before_a_step_and_the_base_never(case, init, scaling):
    model = case.build()
    before, state = case.run(model), {k: v.clone() for k, v in model.state_dict().items()}
    handle = lorakit.attach(model, config(case, init=init, scaling=scaling))
    assert torch.equal(case.run(model), before)
    moved(handle)
    trained = case.run(model)
    assert not torch.allclose(trained, before)
    with handle.disabled():
        assert torch.equal(case.run(model), before)
    value = handle.extract()
    value.check()
    handle.detach()
    assert torch.equal(case.run(model), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    plain = lorakit.attach(model, value)
    assert relative(case.run(model), trained) < 1e-6
    with plain.merged():
        assert relative(case.run(model), trained) < 1e-5


@cases
@pytest.mark.parametrize("init", FROM_WEIGHT)
def test_the_value_is_what_the_factors_have_moved(case, init):
    """In fp64, from what the handle holds."""
    model = case.build()
    handle = lorakit.attach(model, config(case, init=init, scaling="rslora"))
    moved(handle)
    value, held = handle.extract(), {**handle.trainable_tensors(), **handle.fixed_tensors()}
    held = {name: tensor.detach().double() for name, tensor in held.items()}
    assert json.loads(value.metadata[BEGAN]) == {"init": init, "r": 2}
    assert all(f.r == 4 for f in value.factors.values())
    for path, f in value.factors.items():
        s = 5.0 / math.sqrt(2)
        now, then = (
            type(f)(A=held[f"{path}.A{n}"], B=held[f"{path}.B{n}"], alpha=f.alpha, kind=f.kind) for n in ("", "0")
        )
        expected = (now.blocks()[1] @ now.blocks()[0] - then.blocks()[1] @ then.blocks()[0]) * s
        A, B = f.blocks()
        assert relative(B.double() @ A.double() * value.scale(path), expected) < 1e-6


@pytest.mark.parametrize("name", ["llama", "gpt2", "mlp", "convolutions", "embedding"])
@pytest.mark.parametrize("init", ["olora", "pissa"])
def test_residual_form_is_the_papers_on_a_base_without_the_start(name, init):
    case = CASES[name]
    model = case.build()
    handle = lorakit.attach(model, config(case, init=init))
    began = {path: handle.fixed_tensors()[f"{path}.B0"].clone() for path in handle.extract().factors}
    moved(handle)
    trained, value = case.run(model), handle.extract()
    handle.detach()
    originals = {path: weight_at(model, path)[0].detach().clone() for path in value.factors}
    live, taken = residual_form(value)
    assert all(f.r == 2 and live.scale(path) == 2.5 for path, f in live.factors.items())
    lorakit.attach(model, taken).merge(minimum_survival=0.0)
    for path, before in originals.items():
        f = taken.factors[path]
        assert relative(-f.B, began[path]) < 1e-5
        dense, transposed = f.delta("lora") * 1.0, weight_at(model, path)[1]
        change = dense.mT if transposed else dense
        assert relative(weight_at(model, path)[0], before.double() + change.double()) < 1e-6
    lorakit.attach(model, live, check_base=False)
    assert relative(case.run(model), trained) < 1e-5


@pytest.mark.parametrize("init", FROM_WEIGHT)
@pytest.mark.parametrize("delta", ["lora", "dora"])
def test_with_dropout_dora_routes_and_weights(init, delta):
    case = CASES["llama"]
    model = case.build()
    before = case.run(model)
    handle = lorakit.attach(model, config(case, init=init, delta=delta, dropout=0.3), name="a")
    handle.add("b", config(case))
    randomise(handle, "b", 0.1)
    assert relative(case.run(model), before) < (1e-6 if delta == "dora" else 1e-30)
    model.train()
    assert relative(case.run(model), before) < (1e-6 if delta == "dora" else 1e-30)  # dropout is on a zero update
    model.eval()
    moved(handle, "a")
    alone = {}
    for name in "ab":
        handle.activate(name)
        alone[name] = case.run(model)
    rows = len(before)
    with torch.no_grad(), handle.route([["a", "b"][i % 2] for i in range(rows)]):
        routed = case.run(model)
    for i in range(rows):
        assert relative(routed[i], alone["ab"[i % 2]][i]) < 1e-5
    value = handle.extract("a")
    handle.activate({"a": 0.5, "b": 2.0})
    together = case.run(model)
    handle.add("a again", value, check_base=False)
    handle.activate({"a again": 0.5, "b": 2.0})
    assert relative(case.run(model), together) < 1e-5
    again = copy.deepcopy(model)
    assert torch.equal(case.run(again), case.run(model))


def test_values_work_as_plain_ones():
    case = CASES["llama"]
    model = case.build()
    handle = lorakit.attach(model, config(case, init="pissa"))
    moved(handle)
    value = handle.extract()
    path = case.some_path
    assert relative(value.scaled(0.5).delta(path), 0.5 * value.delta(path)) < 1e-6
    assert relative(value.compress(energy=1.0).delta(path), value.delta(path)) < 1e-5
    assert BEGAN not in value.compress(rank=2).metadata
    assert relative(lorakit.combine([value, value], [0.5, 0.5]).delta(path), value.delta(path)) < 1e-5
    assert max(layer.singular_values.numel() for layer in value.spectrum().layers.values()) == 4
    summary = handle.summary()["adapters"]["default"]
    assert summary["ranks"] == [2]
    assert summary["parameters"] == sum(t.numel() for t in value.tensors().values()) // 2


# ---------------------------------------------------------------- against PEFT


def with_pefts_start(init, **changes):
    """(PEFT's model, ours) with one start and one movement from it."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"], **changes}
    base = tiny_llama().eval()
    torch.manual_seed(0)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(init_lora_weights=init, **settings))
    ours = copy.deepcopy(base)
    ours_config = {"r": 4, "alpha": 6.0, "target_modules": settings["target_modules"], "init": init}
    ours_config["scaling"] = "rslora" if changes.get("use_rslora") else "lora"
    handle = lorakit.attach(ours, LoRAConfig(**ours_config))
    return base, theirs, handle


def pairs(theirs, handle):
    own = {**handle.trainable_tensors(), **handle.fixed_tensors()}
    for path in handle.extract().factors:
        layer = theirs.base_model.model.get_submodule(path)
        yield path, own, layer.lora_A["default"].weight, layer.lora_B["default"].weight


@pytest.mark.parametrize("init", ["olora", "pissa", "pissa_niter_8"])
@pytest.mark.parametrize("rslora", [False, True])
def test_start_forward_gradients_and_files_are_pefts(init, rslora, tmp_path):
    base, theirs, handle = with_pefts_start(init, use_rslora=rslora)
    ids = torch.arange(24).view(2, 12)
    for path, own, A, B in pairs(theirs, handle):
        if "niter" not in init:  # whose draws differ
            assert relative(own[f"{path}.B"] @ own[f"{path}.A"], B @ A) < 1e-4
        if init == "olora":
            assert relative(own[f"{path}.A"], A) < 1e-4
        for name, tensor in (("A", A), ("B", B)):  # PEFT's own numbers: signs are free, and draws
            own[f"{path}.{name}"].data.copy_(tensor.detach())
            own[f"{path}.{name}0"].copy_(tensor.detach())
    theirs.save_pretrained(tmp_path / "initial")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path, own, A, B in pairs(theirs, handle):
            for name, tensor in (("A", A), ("B", B)):
                step = 0.05 * torch.randn(tensor.shape, generator=generator)
                tensor.add_(step)
                own[f"{path}.{name}"].add_(step)
    expected, got = theirs(ids).logits, handle.model(ids).logits
    assert relative(got, expected) < 1e-5
    expected.sin().sum().backward()
    got.sin().sum().backward()
    for path, own, A, B in pairs(theirs, handle):
        assert relative(own[f"{path}.A"].grad, A.grad) < 1e-4
        assert relative(own[f"{path}.B"].grad, B.grad) < 1e-4

    handle.save("default", tmp_path / "ours")
    on_pristine = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    assert relative(on_pristine(ids).logits, expected) < 1e-5

    theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "initial")
    read = lorakit.attach(copy.deepcopy(base), tmp_path / "converted")
    assert relative(read.model(ids).logits, expected) < 1e-5


@pytest.mark.parametrize("init", ["olora", "pissa"])
def test_pefts_own_form_is_refused_on_the_pristine_base(init, tmp_path):
    _, theirs, _ = with_pefts_start(init)
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(AdapterFileError, match=f"init_lora_weights is '{init}', which changed the base"):
        Adapter.load(tmp_path / "theirs")


def test_peft_reads_the_residual_form_on_its_base(tmp_path):
    from transformers import AutoModelForCausalLM

    from lorakit.merging.residual import save_residual

    base = tiny_llama().eval()
    base.save_pretrained(tmp_path / "model")
    model, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval(), torch.arange(24).view(2, 12)
    handle = lorakit.attach(model, LoRAConfig(r=4, init="pissa"))
    moved(handle, size=0.02)
    expected, value = model(ids).logits, handle.extract()
    made = save_residual(value, tmp_path / "out", model=str(tmp_path / "model"), verify=False)
    assert made.rank == 4
    assert json.loads((made.adapter / CONFIG_FILE).read_text())["base_model_name_or_path"] == str(made.base)
    residual = AutoModelForCausalLM.from_pretrained(made.base).eval()
    assert relative(residual(ids).logits, base(ids).logits) > 0.1
    adapted = peft.PeftModel.from_pretrained(residual, made.adapter)
    assert relative(adapted(ids).logits, expected) < 1e-5
    with pytest.raises(AdapterError, match="began as a part of their base's weight"):
        save_residual(value.compress(rank=4), tmp_path / "other", model=str(tmp_path / "model"))
    with pytest.raises(ConfigError, match="choose another folder"):
        save_residual(value, tmp_path / "out", model=str(tmp_path / "model"))


# ---------------------------------------------------------------- from data

LLAMA_LINEARS = ("q_proj", "v_proj", "down_proj")


def batches():
    return [{"input_ids": torch.arange(start, start + 40).view(2, 20) % 60} for start in (0, 7, 31)]


def with_labels():
    return [{**batch, "labels": batch["input_ids"]} for batch in batches()]


def test_eva_begins_with_the_components_of_each_layers_inputs():
    model = tiny_llama().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    starts = lorakit.starts_from_data(
        model, LoRAConfig(r=3, init="eva", eva_rho=1.0, target_modules=LLAMA_LINEARS), batches()
    )
    path, seen = "model.layers.1.mlp.down_proj", []
    with torch.no_grad(), _watching(model.get_submodule(path), seen):
        for batch in batches():
            model(**batch)
    rows = torch.cat([x.flatten(0, 1) for x in seen]).double()
    V = torch.linalg.svd(rows - rows.mean(0), full_matrices=False).Vh[:3]
    A = starts.inits[path].A.double()
    assert torch.allclose((A @ V.T).abs(), torch.eye(3).double(), atol=5e-2)  # what was cut off cannot come back
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    q, v = (starts.inits[f"model.layers.0.self_attn.{name}"].A for name in ("q_proj", "v_proj"))
    assert torch.equal(q, v)  # which are given the same
    handle = lorakit.attach(model, starts)
    assert torch.equal(handle.trainable_tensors()[f"{path}.A"], starts.inits[path].A)


def _watching(module, seen):
    class Watching:
        def __enter__(self):
            self.hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))

        def __exit__(self, *_):
            self.hook.remove()

    return Watching()


def test_eva_gives_ranks_where_inputs_vary_in_more_directions_and_keeps_their_sum(tmp_path):
    model = tiny_llama().eval()
    before = model(**batches()[0]).logits
    starts = lorakit.starts_from_data(model, LoRAConfig(r=3, init="eva", alpha=9.0), batches())
    handle = lorakit.attach(model, starts)
    assert torch.equal(model(**batches()[0]).logits, before)
    ranks = {path: f.r for path, f in handle.extract().factors.items()}
    assert sum(ranks.values()) == 3 * 14
    assert len(set(ranks.values())) > 1
    assert max(ranks.values()) <= 6
    assert all(f.alpha == pytest.approx(3 * f.r) for f in handle.extract().factors.values())
    randomise(handle, "default", 0.1)
    trained = model(**batches()[0]).logits
    handle.save("default", tmp_path / "eva")
    base = handle.detach()
    assert (
        relative(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "eva")(**batches()[0]).logits, trained)
        < 1e-5
    )
    lorakit.attach(base, tmp_path / "eva")
    assert torch.equal(base(**batches()[0]).logits, trained)


def test_lora_ga_begins_with_the_gradients_directions_and_holds_few_gradients(monkeypatch):
    model = tiny_llama().eval()
    wanted = LoRAConfig(r=2, init="lora_ga", target_modules=LLAMA_LINEARS, lora_ga_gamma=4.0)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    starts = lorakit.starts_from_data(model, wanted, with_labels())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    monkeypatch.setattr("lorakit.adapter.starts._HELD", 1)  # a layer at a time
    one_by_one = lorakit.starts_from_data(model, wanted, with_labels())
    for path, init in starts.inits.items():
        assert relative(one_by_one.inits[path].B @ one_by_one.inits[path].A, init.B @ init.A) < 1e-4
    loss = sum(model(**batch).loss for batch in with_labels()) / 3
    path = "model.layers.0.self_attn.q_proj"
    weight = model.get_submodule(path).weight
    (gradient,) = torch.autograd.grad(loss, [weight])
    U, _, V = torch.linalg.svd(gradient.double())
    c = weight.shape[0] ** 0.25 / 2
    init = starts.inits[path]
    assert init.from_start
    assert torch.allclose((init.A.double() @ V[:2].T).abs(), c * torch.eye(2).double(), atol=1e-3)
    assert torch.allclose((init.B.double().T @ U[:, 2:4]).abs(), c * torch.eye(2).double(), atol=1e-3)
    before = model(**batches()[0]).logits
    handle = lorakit.attach(model, starts)
    assert torch.equal(model(**batches()[0]).logits, before)
    handle.add("again", starts)  # one start may begin several
    moved(handle)
    handle.activate("again")
    assert torch.equal(model(**batches()[0]).logits, before)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": "olora", "r": 40}, r"first: init 'olora': a matrix of 20 x 12 has no 40 directions"),
        ({"init": "loftq"}, r"init 'loftq' makes up for what quantising the base lost: attach what"),
        ({"init": "eva"}, "init 'eva' looks at data: attach what lorakit.starts_from_data"),
        ({"init": "lora_ga"}, "init 'lora_ga' looks at data"),
    ],
    ids=str,
)
def test_what_cannot_begin_so_is_refused_by_name_and_the_model_is_untouched(changes, message):
    case = CASES["mlp"]
    model = case.build()
    with pytest.raises(ConfigError, match=message):
        lorakit.attach(model, config(case, **changes))
    assert type(model.first) is torch.nn.Linear


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("pisa", "unknown 'pisa'; did you mean pissa"),
        ("olara", "did you mean olora"),
        ("pissa_niter_x", "pissa_niter_16"),
    ],
)
def test_unknown_names_propose_the_nearest(init, message):
    with pytest.raises(ConfigError, match=message):
        LoRAConfig(init=init)


def test_pefts_spellings():
    assert LoRAConfig.from_dict({"init_lora_weights": True}).init == "default"
    assert LoRAConfig.from_dict({"init_lora_weights": "OLoRA"}).init == "olora"
    assert LoRAConfig.from_dict({"peft_init_lora_weights": "pissa_niter_4"}).from_start
    with pytest.raises(ConfigError, match="set init to pissa"):
        LoRAConfig.from_dict({"pissa_init": True})


def test_from_data_names_layers_it_is_not_defined_for():
    model, wanted = CASES["embedding"].build(), {"target_modules": ("table", "out"), "r": 2}
    ids = [torch.arange(12).view(2, 6)]
    for init in ("eva", "lora_ga"):
        with pytest.raises(TargetError, match=r"not for\n  - table\n"):
            lorakit.starts_from_data(model, LoRAConfig(init=init, **wanted), ids)
    with pytest.raises(ConfigError, match="looks at no data"):
        lorakit.starts_from_data(model, LoRAConfig(**wanted), ids)
    with pytest.raises(ConfigError, match="at least one batch"):
        lorakit.starts_from_data(model, LoRAConfig(init="eva", **wanted), [])
    with pytest.raises(ConfigError, match=r"out: 1 for rank 2"):
        lorakit.starts_from_data(model, LoRAConfig(init="eva", r=2, target_modules=("out",)), [torch.tensor([[1, 2]])])
    with pytest.raises(ConfigError, match="out: init 'lora_ga' takes 2 r = 4 directions of a matrix of 3 x 10"):
        lorakit.starts_from_data(
            model, LoRAConfig(init="lora_ga", r=2, target_modules=("out",)), ids, loss=lambda m, x: m(x).sin().sum()
        )


def test_the_residual_form_needs_halves():
    case = CASES["mlp"]
    model = case.build()
    handle = lorakit.attach(model, config(case, r=3))
    with pytest.raises(AdapterError, match="these ranks are odd"):
        residual_form(handle.extract())


def test_a_rank_that_is_too_high_is_told_from_a_skeleton():
    case = CASES["llama"]
    with torch.device("meta"):
        skeleton = case.make()
    with pytest.raises(ConfigError, match="has no 60 directions"):
        lorakit.attach(skeleton, config(case, init="pissa", r=60), check_base=False)


def test_a_blank_adapter_has_the_rank_of_the_file():
    case = CASES["llama"]
    blank = blank_adapter(case.build(), config(case, init="pissa"))
    assert {f.r for f in blank.factors.values()} == {4}


# ---------------------------------------------------------------- A as it began (LoRA-FA)


def test_with_lora_fa_B_alone_is_trained():
    case = CASES["llama"]
    model = case.build()
    handle = lorakit.attach(model, config(case, lora_fa=True))
    assert {name.rsplit(".", 1)[1] for name in handle.trainable_tensors()} == {"B"}
    assert {name.rsplit(".", 1)[1] for name in handle.fixed_tensors()} == {"A"}
    case.run(model).sin().sum().backward()
    lora = model.get_submodule(case.some_path).lorakit_updates["0"].lora
    assert lora.A.grad is None
    assert lora.B.grad.any()
    again = lorakit.attach(case.build(), handle.extract(), trainable=True)
    assert any(name.endswith(".A") for name in again.trainable_tensors()) is False


def test_lora_fa_refuses_an_embedding_whose_A_begins_as_zero():
    case = CASES["embedding"]
    with pytest.raises(ConfigError, match="table: lora_fa keeps A as it begins"):
        lorakit.attach(case.build(), config(case, lora_fa=True))
    lorakit.attach(case.build(), config(case, lora_fa=True, init="gaussian"))
