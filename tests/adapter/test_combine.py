"""Combining adapters, against sums of dense updates in fp64, active sums on the model, and PEFT."""

import itertools
import json
import warnings
from dataclasses import replace

import peft
import pytest
import torch
from torch import nn

import lorakit
from adapter.models import CASES, randomise
from lorakit import Adapter, LoRAConfig
from lorakit.adapter.combine import METHODS, Options, combine_with_report
from lorakit.core import consensus
from lorakit.errors import AdapterError

cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
ELEMENTWISE = [name for name in consensus.RECIPES if name != "linear"]


def attached(case, **configs):
    """A handle with a random adapter for each name."""
    model = case.build()
    handle = None
    for seed, (name, changes) in enumerate(configs.items()):
        config = LoRAConfig(**{"r": 4, "alpha": 8.0, **case.what, **changes})
        if handle is None:
            handle = lorakit.attach(model, config, name=name, seed=seed)
        else:
            handle.add(name, config, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in handle.trainable_tensors(name).values():
                parameter.add_(torch.empty(parameter.shape).normal_(0, 0.2, generator=generator))
    return handle


def two(case):
    """Adapters of different rank, scale and pattern."""
    return attached(case, a={}, b={"r": 2, "alpha": 3.0, "scaling": "rslora"})


def dense_sum(values, weights, path):
    return sum(w * v.delta(path).double() for v, w in zip(values, weights, strict=True) if path in v.factors)


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


# ---------------------------------------------------------------- exact ones


@cases
@pytest.mark.parametrize("method", ["cat", "linear"])
@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, -1.0)])
def test_exact_sums_over_every_site(case, method, weights, tmp_path):
    handle = two(case)
    values = [handle.extract("a"), handle.extract("b")]
    combined = lorakit.combine(values, weights, method)
    for path in combined.factors:
        assert relative(combined.delta(path), dense_sum(values, weights, path)) < 1e-6
    handle.activate(dict(zip("ab", weights, strict=True)))
    expected = case.run(handle.model).detach()
    handle.load(combined, "ab")
    handle.activate("ab")
    torch.testing.assert_close(case.run(handle.model), expected, rtol=1e-5, atol=1e-5)
    assert Adapter.load(combined.save(tmp_path / "ab")).digest() == combined.digest()


def test_layers_that_only_one_adapter_has():
    case = CASES["llama"]
    handle = attached(
        case,
        a={"target_modules": ("q_proj", "up_proj"), "rank_pattern": {"up_proj": 2}},
        b={"target_modules": ("q_proj", "down_proj"), "layers": (1,), "alpha_pattern": {"down_proj": 1.0}},
        c={"target_modules": "all-linear", "exclude_modules": ("q_proj",), "r": 1},
    )
    values = [handle.extract(name) for name in "abc"]
    for chosen in itertools.chain(itertools.combinations(range(3), 2), [(0, 1, 2)]):
        own, weights = [values[i] for i in chosen], [0.5, -2.0, 1.5][: len(chosen)]
        for method in ("cat", "svd", "ties", "knots"):
            combined = lorakit.combine(own, weights, method)
            assert set(combined.factors) == {path for value in own for path in value.factors}
            handle.load(combined, "all", replace="all" in handle.names)
        combined = lorakit.combine(own, weights)
        handle.load(combined, "all", replace=True)
        handle.activate({"abc"[i]: w for i, w in zip(chosen, weights, strict=True)})
        expected = case.run(handle.model).detach()
        handle.activate("all")
        torch.testing.assert_close(case.run(handle.model), expected, rtol=1e-5, atol=1e-5)


def test_a_union_of_layers_means_no_others_in_the_model():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.out, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
            self.net = nn.ModuleDict({"out": nn.Linear(4, 4)})

    model = Nested()
    handle = lorakit.attach(model, LoRAConfig(r=2, target_modules=r"out"), name="a")
    handle.add("b", LoRAConfig(r=2, target_modules=r"other"))
    randomise(handle, "a")
    randomise(handle, "b")
    combined = lorakit.combine([handle.extract("a"), handle.extract("b")])
    handle.load(combined, "ab")
    assert set(handle.extract("ab").factors) == {"out", "other"}


def test_linear_keeps_the_rank_where_a_factor_is_common():
    value = two(CASES["mlp"]).extract("a")
    generator = torch.Generator().manual_seed(5)
    other = replace(
        value,
        factors={p: replace(f, B=torch.randn(f.B.shape, generator=generator)) for p, f in value.factors.items()},
    )
    for pair in ([value, other], [value, value]):
        combined = lorakit.combine(pair, [0.7, 0.4], "linear")
        assert {f.r for f in combined.factors.values()} == {4}
        for path in combined.factors:
            assert relative(combined.delta(path), dense_sum(pair, [0.7, 0.4], path)) < 1e-6
    assert {f.r for f in lorakit.combine([value, other]).factors.values()} == {8}


def test_subtracting_undoes_adding():
    handle = two(CASES["llama"])
    a, b = handle.extract("a"), handle.extract("b")
    back = lorakit.combine([lorakit.combine([a, b], [1, 1]), b], [1, -1], "linear")
    assert {f.r for f in back.factors.values()} == {4}
    assert all(relative(back.delta(path), a.delta(path).double()) < 1e-5 for path in a.factors)
    negated = lorakit.combine([a], [-1.0])
    assert all(relative(negated.delta(path), -a.delta(path).double()) < 1e-6 for path in a.factors)


def test_a_sum_over_layers_and_stacks_names_each_in_its_own_list():
    case = CASES["mixtral"]
    stacks = ("model.layers.0.mlp.experts.down_proj",)
    handle = attached(
        case,
        a={"target_modules": ("q_proj",), "target_parameters": ()},
        b={"target_modules": (), "target_parameters": stacks},
    )
    combined = lorakit.combine([handle.extract("a"), handle.extract("b")])
    assert combined.config.target_parameters == stacks
    handle.activate(["a", "b"])
    expected = case.run(handle.model).detach()
    handle.load(combined, "ab")
    handle.activate("ab")
    torch.testing.assert_close(case.run(handle.model), expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- truncated ones


@cases
def test_svd_is_the_best_approximation_of_the_sum(case):
    handle = two(case)
    values, weights = [handle.extract("a"), handle.extract("b")], [0.7, 0.3]
    rank = 2 if case is CASES["convolutions"] else 3
    report = combine_with_report(values, weights, "svd", Options(rank=rank))
    for path, f in report.adapter.factors.items():
        groups = len(f.blocks()[0])
        target = dense_sum(values, weights, path)
        target = target.T if f.kind == "embedding" else target
        dense = target if f.kind == "experts" else target.reshape(groups, target.shape[0] // groups, -1)
        best = float(torch.linalg.svdvals(dense)[..., rank // f.rank_shares :].norm())
        assert report.errors[path] == pytest.approx(best, rel=1e-3, abs=1e-6)
        target = dense_sum(values, weights, path)
        assert float((report.adapter.delta(path) - target).norm()) == pytest.approx(best, rel=1e-3, abs=1e-5)
    assert 0 < report.relative_error < 1
    told = json.loads(report.adapter.metadata["combined"])
    assert told["method"] == "svd"
    assert told["relative_error"] == pytest.approx(report.relative_error, rel=1e-4)
    assert {f.r for f in lorakit.combine(values, weights, "svd").factors.values()} <= {3, 4}
    by_energy = combine_with_report(values, weights, "svd", Options(energy=0.9))
    assert by_energy.relative_error <= 0.1**0.5


@cases
@pytest.mark.parametrize("method", ELEMENTWISE)
def test_methods_on_elements_work_on_the_dense_update(case, method):
    """With a rank that holds everything, the result is the fp64 recipe on the dense updates."""
    handle = two(case)
    values, weights = [handle.extract("a"), handle.extract("b")], [0.7, -0.5]
    path = case.some_path
    full = min(values[0].factors[path].matrix_shape) * 2
    values = [replace(v, factors={path: v.factors[path]}) for v in values]
    report = combine_with_report(values, weights, method, Options(rank=full, density=0.6, seed=3))
    assert report.relative_error < 1e-5
    found = report.adapter.delta(path).double()
    if consensus.RECIPES[method].thin is consensus.keep_largest:
        dense = [v.delta(path).double() for v in values]
        thin = [torch.where(d.abs() >= d.abs().flatten().topk(int(0.6 * d.numel())).values[-1], d, 0) for d in dense]
        parts = torch.stack([w * d for w, d in zip(weights, thin, strict=True)])
        expected = parts.sum(0)
        if method == "ties":
            agree = parts.sign() == expected.sign()
            expected = (parts * agree).sum(0) / agree.sum(0).clamp(min=1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    else:
        sparse = float((found.abs() > 1e-5).double().mean())
        assert sparse + 0.2 >= 0.6
        assert relative(found, dense_sum(values, weights, path)) > 0.1


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("cat", "linear")])
def test_the_reported_error_is_what_was_lost_and_draws_follow_the_seed(method):
    handle = two(CASES["llama"])
    values = [handle.extract("a"), handle.extract("b")]
    whole = Options(seed=1) if method in ("svd", "knots") else Options(rank=32, seed=1)
    target = combine_with_report(
        values, [1.0, 0.5], method if method != "svd" else "cat", whole if method != "svd" else None
    )
    small = combine_with_report(values, [1.0, 0.5], method, Options(rank=2, seed=1))
    for path, f in small.adapter.factors.items():
        assert f.r == 2
        lost = float((target.adapter.delta(path) - small.adapter.delta(path)).double().norm())
        assert small.errors[path] == pytest.approx(lost, rel=1e-3)
    again = lorakit.combine(values, [1.0, 0.5], method, rank=2, seed=1)
    assert again.digest() == small.adapter.digest()
    if "dare" in method or "della" in method:
        assert lorakit.combine(values, [1.0, 0.5], method, rank=2, seed=2).digest() != again.digest()


@cases
def test_knots_needs_no_truncation_and_its_sum_is_the_sum(case):
    handle = two(case)
    values, weights = [handle.extract("a"), handle.extract("b")], [0.7, -0.3]
    combined = combine_with_report(values, weights, "knots", Options(inside="linear"))
    assert combined.error == 0
    for path in combined.adapter.factors:
        assert relative(combined.adapter.delta(path), dense_sum(values, weights, path)) < 1e-6


def test_knots_is_the_papers_construction():
    handle = two(CASES["mlp"])
    values = [handle.extract("a"), handle.extract("b")]
    combined = lorakit.combine(values, [1.0, 1.0], "knots", density=0.5)
    for path in combined.factors:
        D = [v.delta(path).double() for v in values]
        U, S, V = torch.linalg.svd(torch.cat(D, dim=1), full_matrices=False)
        k = 6  # the sum of ranks; beyond it is rounding
        aligned = (S[:k, None] * V[:k]).split([d.shape[1] for d in D], dim=1)
        generators = [torch.Generator(), torch.Generator()]
        recipe = consensus.RECIPES["ties"]
        fused = consensus.fused(recipe, list(aligned), [1.0, 1.0], density=0.5, epsilon=0, generators=generators)
        torch.testing.assert_close(combined.delta(path).double(), U[:, :k] @ fused, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- against PEFT


def weighted_by_peft(tmp_path, case, method, **options):
    """PEFT's combination of our two adapters: module path -> dense update."""
    handle = two(case) if options.pop("different", False) else attached(case, a={}, b={"alpha": 3.0})
    for name in "ab":
        handle.save(name, tmp_path / name)
    values = [handle.extract("a"), handle.extract("b")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.PeftModel.from_pretrained(handle.detach(), tmp_path / "a", adapter_name="a")
        wrapped.load_adapter(tmp_path / "b", "b")
        wrapped.add_weighted_adapter(["a", "b"], [0.7, 0.3], "ab", combination_type=method, **options)
    modules = dict(wrapped.base_model.model.named_modules())
    return values, {path: modules[path].get_delta_weight("ab").detach() for path in values[0].factors}


@pytest.mark.parametrize(("method", "options"), [("cat", {}), ("svd", {"svd_rank": 3})])
def test_where_peft_is_right_we_agree(method, options, tmp_path):
    values, theirs = weighted_by_peft(tmp_path, CASES["llama"], method, **options)
    ours = lorakit.combine(values, [0.7, 0.3], method, rank=options.get("svd_rank"))
    for path, delta in theirs.items():
        torch.testing.assert_close(ours.delta(path), delta, rtol=1e-3, atol=1e-4)


def test_linear_has_no_cross_terms(tmp_path):
    """PEFT adds up the As and the Bs and multiplies the sums, which adds B_a A_b and B_b A_a."""
    values, theirs = weighted_by_peft(tmp_path, CASES["llama"], "linear")
    ours = lorakit.combine(values, [0.7, 0.3], "linear")
    for path, delta in theirs.items():
        expected = dense_sum(values, [0.7, 0.3], path)
        assert relative(ours.delta(path), expected) < 1e-6
        assert relative(delta, expected) > 0.3


def test_rslora_adapters_are_not_made_larger():
    """peft#3761: a weighted combination of rsLoRA adapters came out 2.6 times too large."""
    handle = attached(CASES["mlp"], a={"r": 7, "scaling": "rslora"}, b={"r": 7, "scaling": "rslora"})
    values = [handle.extract("a"), handle.extract("b")]
    for method in ("cat", "linear", "svd", "knots"):
        combined = lorakit.combine([values[0]], [1.0], method)
        for path in combined.factors:
            ratio = float(combined.delta(path).norm() / values[0].delta(path).norm())
            if method != "knots":  # whose ties drops elements
                assert ratio == pytest.approx(1.0, rel=1e-5)
    half = lorakit.combine(values, [0.5, 0.5])
    assert half.config.scaling == "lora"
    assert all(relative(half.delta(p), dense_sum(values, [0.5, 0.5], p)) < 1e-6 for p in half.factors)


# ---------------------------------------------------------------- whole tensors


def heads(**weights):
    case = CASES["vit"]
    settings = {"target_modules": ("q_proj",), "modules_to_save": ("classifier",), "bias": "lora_only"}
    return case, attached(case, a=settings, b={**settings, "r": 2}, c={"target_modules": ("q_proj",)})


@pytest.mark.parametrize(
    "weights", [{"a": 0.6, "b": 0.4}, {"a": 1.0, "c": 0.3}, {"a": 1.5, "b": -0.5, "c": 2.0}], ids=str
)
def test_whole_tensors_add_up_where_the_base_cancels(weights):
    case, handle = heads()
    combined = lorakit.combine([handle.extract(name) for name in weights], list(weights.values()))
    handle.activate(weights)
    expected = case.run(handle.model).detach()
    handle.load(combined, "all")
    handle.activate("all")
    torch.testing.assert_close(case.run(handle.model), expected, rtol=1e-5, atol=1e-5)


def test_whole_tensors_that_need_the_base_are_refused_by_name():
    _, handle = heads()
    a, b, c = (handle.extract(name) for name in "abc")
    for values, weights in (([a, b], [1, 1]), ([a, c], [0.5, 0.5])):
        with pytest.raises(AdapterError, match=r"(?s)(bias|module to save) .*weight .* in all.*activate the adapters"):
            lorakit.combine(values, weights)
    elsewhere = attached(CASES["vit"], d={"target_modules": ("v_proj",)}).extract("d")
    with pytest.raises(AdapterError, match="v_proj: its bias, if it has one"):
        lorakit.combine([a, elsewhere], [1.0, 1.0])
    low_rank = attached(CASES["vit"], d={"target_modules": ("classifier",)}).extract("d")
    with pytest.raises(AdapterError, match="classifier: trained whole by one adapter and by low rank"):
        lorakit.combine([replace(a, biases={}, config=replace(a.config, bias="none")), low_rank])


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "tise"}, "unknown method 'tise'; did you mean ties"),
        ({"weights": [1.0]}, "2 adapters and 1 weights"),
        ({"weights": [0.0, 0.0]}, "nothing to combine"),
        ({"weights": [1.0, float("nan")]}, "not a finite number"),
        ({"rank": 3}, "rank: cat does not take it; it takes no options"),
        ({"method": "ties", "epsilon": 0.1}, "epsilon: ties does not take it; it takes density, rank"),
        ({"method": "ties", "density": 0.0}, r"density: a share in \(0, 1\]"),
        ({"method": "svd", "rank": 0}, "rank: must be at least 1"),
        ({"method": "svd", "rank": 2, "energy": 0.5}, "rank and energy: give one"),
        ({"method": "della", "density": 0.9, "epsilon": 0.3}, "must lie in"),
        ({"method": "knots", "inside": "cat"}, "inside: one of linear"),
        ({"method": "knots", "inside": "linear", "density": 0.4}, "leaves every element"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments, message):
    handle = two(CASES["mlp"])
    with pytest.raises(AdapterError, match=message):
        lorakit.combine([handle.extract("a"), handle.extract("b")], **arguments)


def test_all_problems_come_in_one_error():
    handle = two(CASES["mlp"])
    with pytest.raises(AdapterError) as caught:
        lorakit.combine([handle.extract("a")], [1.0, 2.0], "svd", rank=-1, density=0.5)
    assert all(word in str(caught.value) for word in ("2 weights", "must be at least 1", "density: svd"))


def test_other_bases_and_other_shapes_are_refused():
    a = two(CASES["llama"]).extract("a")
    other = CASES["llama"].build()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(2)
    handle = lorakit.attach(other, LoRAConfig(r=2))
    randomise(handle)
    b = handle.extract()
    with pytest.raises(AdapterError, match="adapters 1 and 2: base: same shapes, other weights"):
        lorakit.combine([a, b])
    lorakit.combine([a, b], check_base=False)
    named = [replace(v, base=replace(v.base, structure="", name=name)) for v, name in ((a, "one"), (b, "two"))]
    with pytest.raises(AdapterError, match="made on one, the other on two"):
        lorakit.combine(named)
    path = "model.layers.0.self_attn.q_proj"
    f = b.factors[path]
    b = replace(b, factors={**b.factors, path: replace(f, A=f.A[:, 1:])})
    with pytest.raises(AdapterError, match=f"{path}: adapter 1 has a matrix, 32 to 32"):
        lorakit.combine([a, b], check_base=False)


def test_saved_adapters_are_taken_by_their_path(tmp_path):
    handle = two(CASES["mlp"])
    paths = [handle.save(name, tmp_path / name) for name in "ab"]
    values = [handle.extract(name) for name in "ab"]
    assert lorakit.combine(paths, [1, 2]).digest() == lorakit.combine(values, [1, 2]).digest()


def test_an_adapter_of_weight_zero_brings_nothing():
    handle = two(CASES["mlp"])
    a, b = handle.extract("a"), handle.extract("b")
    assert lorakit.combine([a, b], [0.5, 0.0]).digest() == lorakit.combine([a], [0.5]).digest()


def test_updates_that_cancel_leave_no_rank_behind():
    case = CASES["llama"]
    handle = lorakit.attach(case.build(), LoRAConfig(r=4))
    randomise(handle)
    value = handle.extract()
    gone = lorakit.combine([value, value], [1.0, -1.0], method="linear")
    assert {f.r for f in gone.factors.values()} == {1}
