"""Switching, routing, replacing and folding in, over every kind of site."""

import asyncio
import copy
import math
import threading

import pytest
import torch
from torch import nn

import lorakit
from adapter.models import CASES, Case, llama, randomise, weight_at
from lorakit import LoRAConfig
from lorakit.errors import AdapterError, TargetError
from tiny_models import tiny_gpt2, tiny_llama

cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
ODD_NAMES = ["train", "eval", "a.b", "layers", "0", "keys", "base", "A", "ä ö", "lora_A", "weight", "default "]


def config(case: Case, **changes) -> LoRAConfig:
    return LoRAConfig(**{"r": 4, "alpha": 8.0, **case.what, **changes})


def with_two(case: Case, dtype: torch.dtype = torch.float32, **changes):
    """A model with adapters "a" (active) and "b", of different rank."""
    model = case.build(dtype)
    handle = lorakit.attach(model, config(case, **changes), name="a")
    handle.add("b", config(case, r=2, alpha=3.0, scaling="rslora"))
    for name in ("a", "b"):
        randomise(handle, name)
    return model, handle


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm())


# ---------------------------------------------------------------- folded in


@cases
@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 6e-2)])
def test_merged_equals_active(case, bias, dtype, tolerance):
    model, handle = with_two(case, dtype)
    if any(name.endswith("bias_k") for name, _ in model.named_parameters()):
        bias = "none"  # is refused
    handle.add("c", config(case, bias=bias if any(n.endswith("bias") for n, _ in model.named_parameters()) else "none"))
    randomise(handle, "c", 0.1)
    for active in ("a", {"a": 0.7, "b": -0.3}, ["a", "b", "c"]):
        handle.activate(active)
        unmerged = case.run(model)
        with handle.merged():
            assert relative(case.run(model), unmerged) < tolerance
        assert torch.equal(case.run(model), unmerged)
    expected = case.run(model)
    merged = handle.merge(minimum_survival=0.5)
    assert merged is model
    assert not hasattr(model, "_lorakit")
    assert relative(case.run(model), expected) < tolerance


@cases
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-7), (torch.bfloat16, 3e-3)])
def test_a_folded_weight_is_the_fp64_sum_rounded_once(case, dtype, tolerance):
    model, handle = with_two(case, dtype)
    base = {path: weight_at(model, path)[0].detach().double() for path in handle.extract("a").factors}
    adapters = [(handle.extract("a"), 0.7), (handle.extract("b"), -0.3)]
    handle.activate({"a": 0.7, "b": -0.3})
    with handle.merged():
        for path, weight in base.items():
            folded, transposed = weight_at(model, path)
            update = sum(factor * adapter.delta(path).double() for adapter, factor in adapters)
            assert relative(folded, weight + (update.mT if transposed else update)) < tolerance, path


@cases
def test_a_thousand_blocks_change_no_bit_of_the_base(case):
    model, handle = with_two(case, torch.bfloat16)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    objects = {name: id(p) for name, p in model.named_parameters()}
    for i in range(1000 if case is CASES["mlp"] else 3):
        handle.activate("a" if i % 2 else {"a": 0.5, "b": 2.0})
        with handle.merged():
            pass
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert {name: id(p) for name, p in model.named_parameters()} == objects


def test_a_merged_block_is_undone_whatever_is_raised():
    model, handle = with_two(CASES["llama"])
    before = CASES["llama"].run(model)
    with pytest.raises(ZeroDivisionError), handle.merged():
        1 / 0  # noqa: B018
    assert torch.equal(CASES["llama"].run(model), before)
    assert handle.active == {"a": 1.0}


def test_inside_a_merged_block_nothing_else_can_be_done_with_the_adapters():
    _, handle = with_two(CASES["mlp"])
    forbidden = [
        lambda: handle.activate("b"),
        lambda: handle.add("c", LoRAConfig(r=2)),
        lambda: handle.remove("a"),
        lambda: handle.detach(),
        lambda: handle.merge(),
        lambda: handle.disabled().__enter__(),
        lambda: handle.route(["a"]).__enter__(),
        lambda: handle.merged().__enter__(),
    ]
    with handle.merged():
        for action in forbidden:
            with pytest.raises(AdapterError, match="not inside merged"):
                action()
        assert handle.extract("a").factors
    handle.activate("b")


def test_merging_nothing_is_an_error():
    _, handle = with_two(CASES["mlp"])
    handle.activate(None)
    for action in (handle.merge, lambda: handle.merged().__enter__(), handle.merge_report):
        with pytest.raises(AdapterError, match="no adapter is active"):
            action()


def test_an_update_that_does_not_fit_the_dtype_is_refused_and_changes_nothing():
    case = CASES["mlp"]
    model, handle = with_two(case, torch.float16)
    with torch.no_grad():
        handle.trainable_tensors("a")["second.B"].fill_(1e6)
    state = copy.deepcopy(model.state_dict())
    for action in (handle.merge, lambda: handle.merged().__enter__()):
        with pytest.raises(AdapterError, match=r"second\.weight: not finite in float16"):
            action()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def small_update(ratio: float, dtype: torch.dtype, rows: int = 64):
    """A bf16 layer and an adapter whose update is `ratio` of the weight's norm."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, rows)).to(dtype)
    handle = lorakit.attach(model, LoRAConfig(r=8, alpha=8))
    randomise(handle)
    layer = handle.trainable_tensors()
    size = (layer["0.B"] @ layer["0.A"]).norm() / model[0].weight.float().norm()
    with torch.no_grad():
        layer["0.B"].mul_(ratio / size)
    return model, handle


@pytest.mark.parametrize(("ratio", "survives"), [(1e-4, 0.06), (1e-3, 0.53), (3e-3, 0.93), (1e-2, 1.0)])
def test_how_much_of_an_update_survives_rounding_to_bf16(ratio, survives):
    """The shares measured for bf16 merges of updates of this relative size."""
    _, handle = small_update(ratio, torch.bfloat16)
    report = handle.merge_report()
    (layer,) = report.layers
    assert layer.name == "0.weight"
    assert layer.ratio == pytest.approx(ratio, rel=1e-3)
    assert report.survived == pytest.approx(survives, abs=0.12)


def test_a_merge_that_loses_the_update_is_refused_with_the_ways_out():
    model, handle = small_update(1e-4, torch.bfloat16)
    before = model[0].weight.clone()
    with pytest.raises(AdapterError, match=r"(?s)of the update would survive.*0\.weight.*stochastically"):
        handle.merge()
    assert torch.equal(model[0].weight, before)
    assert handle.active == {"default": 1.0}
    handle.merge(minimum_survival=0.0)
    assert not hasattr(model, "_lorakit")


def test_stochastic_rounding_keeps_a_small_update_in_the_mean_and_repeats():
    results = []
    for _ in range(2):
        model, handle = small_update(1e-4, torch.bfloat16, rows=512)
        base = model[0].weight.clone()
        update = handle.extract().delta("0")
        handle.merge(rounding="stochastic", seed=3)
        results.append(model[0].weight.clone())
        change = (model[0].weight.float() - base.float()).double().detach()
        assert float((change * update).sum() / update.double().pow(2).sum()) == pytest.approx(1.0, abs=0.15)
    assert torch.equal(*results)


def test_an_unknown_rounding_is_an_error():
    _, handle = with_two(CASES["mlp"])
    with pytest.raises(AdapterError, match="'nearest' or 'stochastic'"):
        handle.merge(rounding="up")


def test_an_adapted_embedding_is_untied_from_the_head(tmp_path):
    """peft#2018: merging into a tied embedding would change the head too."""
    model = tiny_llama()
    ids = torch.randint(0, 200, (2, 6))
    handle = lorakit.attach(model, LoRAConfig(r=4, target_modules=["embed_tokens", "q_proj"]))
    randomise(handle)
    unmerged, head = model(ids).logits, model.lm_head.weight.clone()
    assert handle.merge_report().untied == ("model.embed_tokens.weight",)
    with handle.merged():
        assert torch.allclose(model(ids).logits, unmerged, atol=1e-4)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    merged = handle.merge()
    assert torch.allclose(merged(ids).logits, unmerged, atol=1e-4)
    assert torch.equal(merged.lm_head.weight, head)
    assert merged.config.tie_word_embeddings is False
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, merged(ids).logits)


def test_whole_trained_modules_are_folded_in_with_their_statistics():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    handle = lorakit.attach(model, LoRAConfig(r=2, target_modules=["0"], modules_to_save=("1", "2")))
    randomise(handle)
    model.train()
    model(torch.randn(16, 4))
    model.eval()
    x = torch.randn(3, 4)
    unmerged = model(x)
    with handle.merged():
        assert torch.allclose(model(x), unmerged, atol=1e-6)
    assert not torch.equal(model[1].running_mean, handle.extract().replaced["1.running_mean"])
    assert torch.allclose(handle.merge()(x), unmerged, atol=1e-6)


# ---------------------------------------------------------------- routes


@cases
@pytest.mark.parametrize("names", [["a", None, "b"], ["b", "a", "b"], ["a", "a", "a"], [None, None, None]])
def test_each_row_gets_its_own_adapter(case, names):
    model, handle = with_two(case)
    torch.manual_seed(1)
    rows = {key: torch.cat([value, value.flip(0)])[:3] for key, value in case.inputs().items()}

    def run() -> torch.Tensor:
        output = model(**rows)
        return output if isinstance(output, torch.Tensor) else output[0]

    expected = []
    for row, name in enumerate(names):
        handle.activate(name)
        expected.append(run()[row])
    handle.activate("b")
    with handle.route(names):
        got = run()
    assert torch.allclose(got, torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert handle.active == {"b": 1.0}


def test_few_tokens_a_row_go_through_all_adapters_at_once():
    """Without gradients: one product with the stacked factors, which follow when the factors change or rows do."""
    model, handle = with_two(CASES["llama"])
    names = ["b", None, "a", "b"]
    for length in (1, 3, 4, 9):
        ids = torch.randint(0, 96, (4, length))
        with handle.route(names):
            expected = model(ids).logits.detach()
            with torch.no_grad():
                assert torch.allclose(model(ids).logits, expected, atol=1e-5)
                with torch.no_grad():
                    handle.trainable_tensors("b")["model.layers.0.mlp.up_proj.B"].mul_(3)
                changed = model(ids).logits
            assert torch.allclose(changed, model(ids).logits.detach(), atol=1e-5)
            assert not torch.allclose(changed[0], expected[0], atol=1e-3)
            with torch.inference_mode():
                assert torch.allclose(model(ids).logits, changed, atol=1e-5)


def test_gradients_of_a_routed_batch_are_those_of_its_rows():
    model, handle = with_two(CASES["llama"])
    ids = torch.randint(0, 96, (3, 5))
    names = ["a", "b", "a"]
    with handle.route(names):
        model(ids).logits.square().mean(dim=(1, 2)).sum().backward()
    got = {n: p.grad.clone() for name in ("a", "b") for n, p in _named(handle, name)}
    model.zero_grad()
    for row, name in enumerate(names):
        handle.activate(name)
        model(ids[row : row + 1]).logits.square().mean().backward()
    for name in ("a", "b"):
        for n, p in _named(handle, name):
            assert torch.allclose(got[n], p.grad, rtol=1e-4, atol=1e-6), n


def _named(handle, name):
    return [(f"{name}:{path}", p) for path, p in handle.trainable_tensors(name).items()]


def test_rows_laid_in_one_line_of_tokens_are_routed():
    """Models that flatten (rows, length, d) to (rows * length, d) before a layer, as mixtures of experts do."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x.reshape(-1, 6)).view_as(x)

    model = Flat()
    handle = lorakit.attach(model, LoRAConfig(r=2), name="a")
    handle.add("b", LoRAConfig(r=2), seed=1)
    randomise(handle, "a"), randomise(handle, "b")
    x = torch.randn(3, 4, 6)
    expected = []
    for row, name in enumerate(["b", None, "b"]):
        handle.activate(name)
        expected.append(model(x)[row])
    with handle.route(["b", None, "b"]):
        assert torch.allclose(model(x), torch.stack(expected), atol=1e-6)
    with handle.route(["b", None]), pytest.raises(AdapterError, match=r"batch has 3 rows, the route names 2"):
        model(x)
    with handle.route(["b", None]), pytest.raises(AdapterError, match="does not begin with the 2 rows"):
        model.layer(x.reshape(-1, 6))


def test_a_generation_is_routed_by_row():
    model = tiny_gpt2()
    handle = lorakit.attach(model, LoRAConfig(r=4), name="a")
    handle.add("b", LoRAConfig(r=4), seed=1)
    randomise(handle, "a"), randomise(handle, "b")
    ids = torch.randint(0, 200, (3, 5))
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    with handle.route(["a", None, "b"]):
        got = model.generate(ids, **settings)
    for row, name in enumerate(["a", None, "b"]):
        handle.activate(name)
        assert torch.equal(got[row], model.generate(ids, **settings)[row])
    with handle.route(["a", "a", "b", "b"]):  # beams: each row stands twice
        beams = model.generate(ids[:2], **settings | {"attention_mask": torch.ones(2, 5)}, num_beams=2)
    assert beams.shape[0] == 2


def test_dropout_is_drawn_on_a_route_too():
    model, handle = with_two(CASES["mlp"], dropout=0.5)
    x = torch.randn(2, 5, 12)
    model.train()
    with handle.route(["a", "b"]):
        first, second = model(x), model(x)
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])  # b has none


def test_modules_trained_whole_are_routed():
    model, handle = with_two(CASES["mlp"])
    handle.add("c", LoRAConfig(r=2, target_modules=["first"], modules_to_save=("norm",)))
    randomise(handle, "c")
    x = torch.randn(3, 5, 12)
    expected = []
    for row, name in enumerate(["c", "a", "c"]):
        handle.activate(name)
        expected.append(model(x)[row])
    with handle.route(["c", "a", "c"]):
        assert torch.allclose(model(x), torch.stack(expected), atol=1e-6)


def test_routes_of_wrong_names_or_none_are_errors():
    _, handle = with_two(CASES["mlp"])
    with pytest.raises(AdapterError, match="no adapter 'aa'; did you mean 'a'"):
        handle.route(["aa"]).__enter__()
    for names in ([], "ab"):
        with pytest.raises(AdapterError, match="a list with one name"):
            handle.route(names).__enter__()
    with handle.route(["a", None]), pytest.raises(AdapterError, match="each row has its own"):
        _ = handle.active


def test_an_exception_leaves_no_trace_of_a_route():
    """peft#3475: an error inside a mixed batch left its hooks behind."""
    model, handle = with_two(CASES["mlp"])
    x = torch.randn(2, 5, 12)
    before = model(x)
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    for block in (lambda: handle.route(["a", "b"]), handle.disabled):
        with pytest.raises(RuntimeError, match="mat1 and mat2"), block():
            model(x[..., 1:])
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()] == hooks
    assert torch.equal(model(x), before)


def test_threads_each_have_their_own_route():
    model, handle = with_two(CASES["llama"])
    ids = torch.randint(0, 96, (2, 5))
    plans = [["a", "b"], ["b", None], [None, "a"], ["b", "a"]]
    expected = []
    for names in plans:
        with handle.route(names), torch.no_grad():
            expected.append(model(ids).logits)
    barrier, wrong = threading.Barrier(len(plans) + 1), []

    def work(names, answer) -> None:
        barrier.wait()
        for _ in range(20):
            with handle.route(names), torch.no_grad():
                if not torch.equal(model(ids).logits, answer):
                    wrong.append(names)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(plans, expected, strict=True)]
    for thread in threads:
        thread.start()
    barrier.wait()
    for _ in range(20):
        handle.activate("a")
        with torch.no_grad():
            plain = model(ids).logits
        with handle.disabled(), torch.no_grad():
            base = model(ids).logits
        assert not torch.equal(plain, base)
    for thread in threads:
        thread.join()
    assert not wrong


def test_asyncio_tasks_each_have_their_own_block():
    model, handle = with_two(CASES["mlp"])
    x = torch.randn(1, 5, 12)
    with handle.disabled():
        base = model(x)
    active = model(x)

    async def base_only() -> bool:
        with handle.disabled():
            await asyncio.sleep(0)
            return torch.equal(model(x), base)

    async def outside() -> bool:
        await asyncio.sleep(0)
        return torch.equal(model(x), active)

    async def both() -> list[bool]:
        return await asyncio.gather(base_only(), outside(), base_only(), outside())

    assert all(asyncio.run(both()))


def test_a_merge_under_another_threads_route_is_an_error_there():
    model, handle = with_two(CASES["mlp"])
    x = torch.randn(1, 5, 12)
    inside, merged, errors = threading.Event(), threading.Event(), []

    def work() -> None:
        with handle.route(["b"]):
            inside.set()
            merged.wait()
            try:
                model(x)
            except AdapterError as error:
                errors.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait()
    with handle.merged():
        merged.set()
        thread.join()
    assert len(errors) == 1
    assert "inside merged()" in errors[0]


# ---------------------------------------------------------------- names, replacement, cost


def test_any_name_works(tmp_path):
    model = llama()
    case = CASES["llama"]
    handle = lorakit.attach(model, config(case), name=ODD_NAMES[0])
    for name in ODD_NAMES[1:]:
        handle.add(name, config(case), seed=len(name))
    for name in ODD_NAMES:
        randomise(handle, name)
        handle.save(name, tmp_path / name)
    outputs = {}
    for name in ODD_NAMES:
        handle.activate(name)
        outputs[name] = case.run(model)
        assert handle.active == {name: 1.0}
    with handle.route([ODD_NAMES[2], ODD_NAMES[3]]):
        case.run(model)
    for name in ODD_NAMES:
        handle.load(tmp_path / name, name, replace=True)
        handle.activate(name)
        assert torch.equal(case.run(model), outputs[name])
        handle.remove(name)
    assert handle.names == ()


def test_an_adapter_is_replaced_by_another_of_other_rank_and_targets(tmp_path):
    case = CASES["llama"]
    model, handle = with_two(case)
    other = llama()
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "lorakit" not in k})
    new = lorakit.attach(other.eval(), LoRAConfig(r=7, target_modules=["q_proj", "embed_tokens"]))
    randomise(new)
    new.save("default", tmp_path)
    handle.activate({"a": 1.0, "b": 0.5})
    handle.load(tmp_path, "a", replace=True)
    assert handle.active == {"a": 1.0, "b": 0.5}
    assert handle.names == ("a", "b")
    handle.activate("a")
    assert torch.equal(case.run(model), case.run(other))
    assert set(handle.extract("a").factors) == set(new.extract().factors)
    handle.detach()
    assert not any("lorakit" in name for name, _ in model.named_modules())


def test_a_replacement_that_does_not_fit_leaves_the_old_one(tmp_path):
    case = CASES["llama"]
    model, handle = with_two(case)
    before = case.run(model)
    with pytest.raises(TargetError):
        handle.add("a", LoRAConfig(target_modules=["nothing_of_that_name"]), replace=True)
    with pytest.raises(AdapterError, match="already there; pass replace=True"):
        handle.add("a", config(case))
    assert torch.equal(case.run(model), before)


def test_a_route_on_a_removed_adapter_ends_with_an_error():
    model, handle = with_two(CASES["mlp"])
    x = torch.randn(1, 5, 12)
    with handle.route(["b"]):
        model(x)
        handle.remove("b")
        with pytest.raises(AdapterError, match="removed or replaced"):
            model(x)


def test_switching_visits_no_layer(monkeypatch):
    """Cost that does not depend on layers or residents: nothing walks the model, no layer is written to."""
    _, handle = with_two(CASES["llama"])
    for i in range(5):
        handle.add(f"more {i}", config(CASES["llama"]))

    def refuse(*_args, **_kwargs) -> None:
        raise AssertionError("walked the model")

    for method in ("modules", "named_modules", "parameters", "named_parameters", "children", "apply", "train"):
        monkeypatch.setattr(nn.Module, method, refuse)
    handle.activate("a")
    handle.activate({"a": 0.5, "more 3": 0.5})
    with handle.disabled():
        pass
    with handle.route(["a", "b"]):
        pass
    assert math.isclose(handle.active["a"], 0.5)
