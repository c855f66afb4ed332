"""DoRA over every kind of site that carries it: W' = m (W + s B A) / ||W + s B A||, row by row."""

import copy
import io
from dataclasses import replace

import pytest
import torch

import lorakit
from adapter.models import CASES, Case, randomise, trained, weight_at
from lorakit import Adapter, LoRAConfig
from lorakit.core.dora import DoRA, dense_delta, row_norms
from lorakit.core.kernels import LoRAOperands, lora_linear, lora_linear_reference
from lorakit.errors import AdapterError, AdapterFileError, AdapterMismatchError, ConfigError, TargetError
from lorakit.formats.peft import CONFIG_FILE, TENSOR_FILE

WITH_DORA = {
    **{n: CASES[n] for n in ("mlp", "convolutions", "embedding", "llama", "llama embedding", "gpt2", "bert", "vit")},
    "torch encoder": replace(CASES["torch encoder"], targets=("linear1", "linear2")),
    "mixtral": replace(CASES["mixtral"], parameters=()),
}
cases = pytest.mark.parametrize("case", WITH_DORA.values(), ids=WITH_DORA)


def config(case: Case, **changes) -> LoRAConfig:
    return LoRAConfig(**{"r": 4, "alpha": 8.0, "delta": "dora", **case.what, **changes})


def with_three(case: Case, dtype: torch.dtype = torch.float32, **changes):
    """A model with "a" (active) and "b", which are DoRA, and "c", which is LoRA."""
    model = case.build(dtype)
    handle = lorakit.attach(model, config(case, **changes), name="a")
    handle.add("b", config(case, r=2, alpha=3.0, scaling="rslora"))
    handle.add("c", config(case, delta="lora", init="gaussian"))
    for name in "abc":
        randomise(handle, name, 0.1)
    return model, handle


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm())


def by_the_paper(weight: torch.Tensor, plain: torch.Tensor, magnitude: torch.Tensor, outputs: int) -> torch.Tensor:
    """W' in fp64, from the dense W and s B A (dimension `outputs` of them is the output's)."""
    V = (weight.double() + plain.double()).movedim(outputs, 0)
    lengths = V.flatten(1).norm(dim=1)
    shape = [-1] + [1] * (V.ndim - 1)
    return (V / lengths.view(shape) * magnitude.double().view(shape)).movedim(0, outputs)


def reference_weight(model, value: Adapter, path: str) -> torch.Tensor:
    weight, transposed = weight_at(model, path)
    f = value.factors[path]
    plain = replace(f, magnitude=None).delta(value.config.scaling)
    plain = plain.mT if transposed else plain
    return by_the_paper(weight, plain, f.magnitude, 1 if transposed or f.kind == "embedding" else 0)


# ---------------------------------------------------------------- in a model


@cases
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("weights", [{"a": 1.0}, {"a": 0.7, "b": -0.3, "c": 1.5}], ids=str)
def test_it_computes_what_the_papers_weights_compute(case, dtype, tolerance, weights):
    model, handle = with_three(case, dtype)
    handle.activate(weights)
    got = case.run(model)
    values = {name: handle.extract(name) for name in weights}
    reference = copy.deepcopy(handle.detach()).double()
    originals = {path: weight_at(reference, path)[0].detach().clone() for path in values["a"].factors}
    changed = {}
    for path, own in originals.items():
        total = own.clone()
        for name, factor in weights.items():
            if name == "c":
                delta, transposed = values[name].delta(path).double(), weight_at(reference, path)[1]
                total += factor * (delta.mT if transposed else delta)
            else:
                total += factor * (reference_weight(reference, values[name], path) - own)
        changed[path] = total
    for path, total in changed.items():  # a new parameter: an embedding's head is not changed with it
        reference.get_submodule(path).weight = torch.nn.Parameter(total)
    assert relative(got, case.run(reference)) < tolerance


@cases
def test_a_fresh_one_changes_nothing_and_detaching_gives_every_bit_back(case):
    model = case.build()
    before, state = case.run(model), {k: v.clone() for k, v in model.state_dict().items()}
    handle = lorakit.attach(model, config(case))
    magnitudes = {name: t for name, t in handle.trainable_tensors().items() if name.endswith(".magnitude")}
    assert {name.removesuffix(".magnitude") for name in magnitudes} == set(handle.extract().factors)
    assert all(t.dtype == torch.float32 and t.requires_grad for t in magnitudes.values())
    assert relative(case.run(model), before) < 1e-6
    case.run(model).sin().sum().backward()
    assert all(t.grad is not None and t.grad.any() for t in magnitudes.values())
    with torch.no_grad():
        for tensor in magnitudes.values():
            tensor.mul_(1.5)
    assert not torch.allclose(case.run(model), before)
    handle.detach()
    assert torch.equal(case.run(model), before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@cases
def test_what_was_evaluated_in_inference_mode_can_be_trained(case):
    model = case.build()
    lorakit.attach(model, config(case))
    with torch.inference_mode():
        case.run(model)
    case.run(model).sin().sum().backward()


@pytest.mark.parametrize("fused", [True, False])
def test_lengths_follow_every_optimiser(fused):
    """The fused one changes tensors without counting it."""
    case = CASES["llama"]
    model = case.build()
    handle = lorakit.attach(model, config(case, dropout=0.0))
    optimizer = torch.optim.AdamW(handle.trainable_parameters(), lr=0.1, fused=fused)
    for _ in range(3):
        with torch.no_grad():
            case.run(model)
        case.run(model).sin().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        got = case.run(model)
    value = handle.extract()
    handle.detach()
    lorakit.attach(model, value)
    assert relative(case.run(model), got) < 1e-6


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_the_formula_with_the_lengths_held_constant(bias):
    """arXiv 2402.09353, section 4.3, by autograd on the dense weight in fp64; fused, and by the plain form."""
    torch.manual_seed(0)
    W, b = torch.randn(6, 7).double(), torch.randn(6).double() if bias else None
    for train_all_in_one in (True, False):
        layer = torch.nn.Linear(7, 6, bias=bias).double()
        layer.weight.data, layer.weight.requires_grad = W.clone(), False
        if bias:
            layer.bias.data = b.clone()
        # dropout of almost nothing takes the form that is not fused
        handle = lorakit.attach(
            torch.nn.Sequential(layer),
            LoRAConfig(r=3, delta="dora", target_modules=("0",), dropout=0.0 if train_all_in_one else 1e-12),
        )
        randomise(handle)
        tensors = {n.removeprefix("0."): t for n, t in handle.trainable_tensors().items()}
        x = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(1)).double().requires_grad_(True)
        layer.train()
        y = layer(x)
        y.sin().sum().backward()
        got = [x.grad, *(tensors[n].grad for n in ("A", "B", "magnitude"))]
        x2 = x.detach().clone().requires_grad_(True)
        A, B, m = (tensors[n].detach().double().requires_grad_(True) for n in ("A", "B", "magnitude"))
        V = W + handle.extract().scale("0") * B @ A
        y2 = torch.nn.functional.linear(x2, m[:, None] * V / V.detach().norm(dim=1, keepdim=True), b)
        torch.testing.assert_close(y, y2, rtol=1e-6, atol=1e-6)
        y2.sin().sum().backward()
        for one, other in zip(got, (x2.grad, A.grad, B.grad, m.grad), strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


def test_the_fused_form_equals_the_plain_one():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 7).double().requires_grad_(True)
    A, B, gain = (torch.randn(*shape).double().requires_grad_(True) for shape in ((3, 7), (6, 3), (6,)))
    for b in (torch.randn(6).double(), None):
        layer = LoRAOperands(torch.randn(6, 7).double(), b, A, B, 0.7, gain)
        torch.testing.assert_close(lora_linear(x, layer), lora_linear_reference(x, layer))
        with torch.no_grad():
            torch.testing.assert_close(lora_linear(x, layer), lora_linear_reference(x, layer))
        assert torch.autograd.gradcheck(
            lambda x, A, B, gain, layer=layer: lora_linear(x, layer._replace(A=A, B=B, gain=gain)), (x, A, B, gain)
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2])
def test_lengths_come_from_the_factors(dtype, groups, monkeypatch):
    """Against the dense sum in fp64, in pieces and whole."""
    torch.manual_seed(0)
    A, B = torch.randn(4, 3, 5), torch.randn(8, 4 // groups, 1)
    if groups == 1:
        A, B = A.flatten(1), B.flatten(1)
    W = torch.randn(8, 15).to(dtype)
    dense = lorakit.core.lowrank.convolution_delta(A.double(), B.double(), 0.7).reshape(8, -1)
    expected = (W.double() + dense).norm(dim=1)
    for at_once in (1 << 22, 20):
        monkeypatch.setattr("lorakit.core.dora._AT_ONCE", at_once)
        assert relative(row_norms(W, A, B, 0.7), expected) < 1e-6
    zero = row_norms(torch.zeros_like(W), A, torch.zeros_like(B), 0.7)
    assert torch.isfinite(1 / zero).all()
    assert not dense_delta(torch.zeros_like(W), A, torch.zeros_like(B), 0.7, torch.zeros(8)).any()


@cases
@pytest.mark.parametrize("few", [False, True])
def test_each_row_of_a_route_gets_its_own(case, few):
    model, handle = with_three(case)
    torch.manual_seed(1)
    rows = {key: torch.cat([value, value.flip(0)])[:4] for key, value in case.inputs().items()}
    if few and "input_ids" in rows:
        rows = {"input_ids": rows["input_ids"][:, :2]}
    names = ["a", None, "c", "b"]

    def run() -> torch.Tensor:
        output = model(**rows)
        return output if isinstance(output, torch.Tensor) else output[0]

    with torch.no_grad() if few else torch.enable_grad():
        expected = []
        for row, name in enumerate(names):
            handle.activate(name)
            expected.append(run()[row])
        with handle.route(names):
            got = run()
            if not few:
                got.sum().backward()
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_lengths_are_computed_again_when_something_changed_and_only_then(monkeypatch):
    from lorakit.core import dora

    calls = []
    own = dora.row_norms
    monkeypatch.setattr(dora, "row_norms", lambda *given: calls.append(1) or own(*given))
    case = WITH_DORA["mlp"]
    model = case.build()
    handle = lorakit.attach(model, config(case, target_modules=("first",)))
    randomise(handle)
    layer, tensors = model.get_submodule("first"), handle.trainable_tensors()

    def changed_by(change) -> bool:
        before, count = case.run(model), len(calls)
        case.run(model)
        assert len(calls) == count  # nothing has changed
        change()
        different = not torch.equal(case.run(model), before)
        assert len(calls) == count + 1
        return different

    case.run(model)
    assert changed_by(lambda: tensors["first.A"].mul_(2.0))
    assert changed_by(lambda: tensors["first.B"].add_(1.0))
    assert changed_by(lambda: layer.weight.mul_(torch.linspace(1, 2, 12)))
    assert changed_by(lambda: setattr(layer.weight, "data", layer.weight.data * torch.linspace(1, 3, 12)))
    twin = copy.deepcopy(model)
    assert torch.equal(case.run(twin), case.run(model))
    with torch.inference_mode():
        case.run(model)


def test_training_it_lowers_the_loss_and_moves_lengths_and_directions():
    case = WITH_DORA["llama"]
    model = case.build()
    handle = lorakit.attach(model, config(case))
    before = handle.extract()
    optimizer = torch.optim.AdamW(handle.trainable_parameters(), lr=3e-2)
    losses = []
    for _ in range(15):
        logits = case.run(model).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, torch.arange(len(logits)) % 5)
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    after = handle.extract()
    for path, f in after.factors.items():
        assert not torch.equal(f.magnitude, before.factors[path].magnitude)
        assert f.B.any()


def test_dropout_is_on_the_update_alone():
    """With B zero there is no update, and dropout changes nothing; PEFT drops the base's input too."""
    case = WITH_DORA["mlp"]
    model = case.build()
    handle = lorakit.attach(model, config(case, dropout=0.5))
    with torch.no_grad():
        for name, tensor in handle.trainable_tensors().items():
            if name.endswith("magnitude"):
                tensor.mul_(1.5)
    expected = case.run(model)
    model.train()
    torch.testing.assert_close(case.run(model), expected)
    randomise(handle)
    assert not torch.allclose(case.run(model), case.run(model.eval()))


@pytest.mark.parametrize(("name", "kind"), [("attention", "MultiheadAttention"), ("qwen3 moe", "stacked experts")])
def test_layers_that_cannot_have_it_are_named_and_nothing_is_touched(name, kind):
    case, model = CASES[name], CASES[name].build()
    with pytest.raises(TargetError, match=rf"{case.some_path}: delta='dora' is not supported for {kind}"):
        lorakit.attach(model, config(case))
    assert not any("lorakit" in key for key in model.state_dict())


def test_what_does_not_go_with_it_is_refused_by_name(tmp_path):
    case = WITH_DORA["mlp"]
    with pytest.raises(ConfigError, match="lora_bias: not with delta 'dora'"):
        config(case, lora_bias=True)
    _, handle = with_three(case)
    value = handle.extract("a")
    with pytest.raises(AdapterError, match="depends on the base's weight"):
        value.delta("first")
    with pytest.raises(AdapterError, match=r"activate it with a weight instead"):
        value.scaled(2.0)
    with pytest.raises(AdapterError, match=r"combine.*'dora'"):
        lorakit.combine([value, handle.extract("c")])
    with pytest.raises(AdapterError, match=r"compress.*'dora'"):
        value.compress(rank=1)
    with pytest.raises(AdapterError, match=r"spectrum.*'dora'"):
        value.spectrum()
    llama = trained(WITH_DORA["llama"].build(), config(WITH_DORA["llama"]))
    for format in ("gguf", "loralib", "vllm", "kohya", "diffusers"):
        with pytest.raises(AdapterFileError, match="DoRA"):
            llama.save(tmp_path / format, format, model=WITH_DORA["llama"].build())
        assert not (tmp_path / format).exists()


def test_values_that_lost_a_part_are_refused():
    case = WITH_DORA["mlp"]
    value = trained(case.build(), config(case))
    f = value.factors["first"]

    def with_first(**changes) -> Adapter:
        return replace(value, factors={**value.factors, "first": replace(f, **changes)})

    wrong = {
        "first: has no magnitude, which delta 'dora' needs": with_first(magnitude=None),
        "first: has a magnitude, which delta 'lora' has not": replace(value, config=config(case, delta="lora")),
        r"first: B \(20, 4\) and its magnitude \(19,\)": with_first(magnitude=f.magnitude[1:]),
        "first: a magnitude is for matrices, embeddings and convolutions, not for attention": with_first(
            kind="attention"
        ),
        "first.magnitude: 1 of 20 values are NaN": with_first(
            magnitude=f.magnitude.where(f.B[:, 0] != f.B[3, 0], torch.nan)
        ),
    }
    for message, one in wrong.items():
        with pytest.raises(AdapterError, match=message):
            one.check()


# ---------------------------------------------------------------- merged


@cases
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 6e-2)])
def test_merged_equals_active(case, dtype, tolerance):
    model, handle = with_three(case, dtype)
    for active in ("a", {"a": 0.7, "b": -0.3, "c": 1.0}):
        handle.activate(active)
        expected = case.run(model)
        with handle.merged():
            assert relative(case.run(model), expected) < tolerance
        assert torch.equal(case.run(model), expected)
    assert handle.merge(minimum_survival=0.5) is model
    assert relative(case.run(model), expected) < tolerance


@cases
def test_a_folded_weight_is_the_papers(case):
    model, handle = with_three(case)
    value = handle.extract("a")
    expected = {path: reference_weight(model, value, path) for path in value.factors}
    weights = {path: weight_at(model, path)[0].detach().clone() for path in value.factors}
    with handle.merged():
        for path, one in expected.items():
            weight, transposed = weight_at(model, path)
            assert relative(weight, one) < 1e-6
            own = weights[path].T if transposed else weights[path]
            delta = value.delta(path, own)
            assert relative(own + delta, one.T if transposed else one) < 1e-6


# ---------------------------------------------------------------- as a value


@cases
def test_files_give_the_same_bytes_and_the_same_adapter(case, tmp_path):
    model = case.build()
    handle = lorakit.attach(model, config(case))
    randomise(handle)
    expected, value = case.run(model), handle.extract()
    handle.save("default", tmp_path / "a")
    Adapter.load(tmp_path / "a").save(tmp_path / "b")
    lorakit.attach(handle.detach(), tmp_path / "b", name="x").save("x", tmp_path / "c")
    for file in (CONFIG_FILE, TENSOR_FILE):
        assert len({(tmp_path / folder / file).read_bytes() for folder in "abc"}) == 1
    assert torch.equal(case.run(model), expected)
    assert lorakit.adapters(model).extract("x").digest() == value.digest()
    path, f = next(iter(value.factors.items()))
    other = replace(value, factors={**value.factors, path: replace(f, magnitude=f.magnitude + 1)})
    assert other.digest() != value.digest()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)  # what is kept of the lengths is in no state dict
    plain = replace(
        value,
        config=replace(value.config, delta="lora"),
        factors={path: replace(f, magnitude=None) for path, f in value.factors.items()},
    )
    with pytest.raises(AdapterMismatchError, match=rf"missing: {path}\.magnitude"):
        lorakit.adapters(model).add("plain", replace(plain, config=value.config))
    assert isinstance(next(m for m in model.modules() if isinstance(m, DoRA)), DoRA)
