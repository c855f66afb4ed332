"""torch's MultiheadAttention with adapters against torch's own forward."""

import copy
import itertools

import pytest
import torch
from torch import nn

import lorakit
from adapter.models import randomise, weight_at
from lorakit import LoRAConfig
from lorakit.core.sites import site_of
from lorakit.errors import AdapterError, TargetError

LENGTH, SPAN, ROWS, D, HEADS = 5, 7, 3, 12, 3


class Holder(nn.Module):
    def __init__(self, **settings) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(D, HEADS, **settings)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, 0.3)

    def forward(self, *args, **kwargs):
        return self.attn(*args, **kwargs)


def holder(dtype=torch.float32, **settings) -> Holder:
    torch.manual_seed(0)
    return Holder(**settings).to(dtype).eval()


def inputs(model: nn.Module, which: str, dtype=torch.float32, *, batched=True):
    """Query, key and value as a caller gives them: which of them are one tensor matters to torch."""
    torch.manual_seed(1)
    attn = model.attn
    shapes = [(LENGTH, attn.embed_dim), (SPAN, attn.kdim), (SPAN, attn.vdim)]
    query, key, value = (torch.randn(ROWS, n, d, dtype=dtype) for n, d in shapes)
    key, value = {"self": (query, query), "cross": (key, key), "three": (key, value)}[which]
    if not batched:
        one = {id(x): x[0] for x in (query, key, value)}
    elif attn.batch_first:
        return query, key, value
    else:
        one = {id(x): x.transpose(0, 1).contiguous() for x in (query, key, value)}
    return tuple(one[id(x)] for x in (query, key, value))


def masks(span: int):
    causal = torch.ones(LENGTH, span, dtype=torch.bool).triu(1)
    padding = torch.zeros(ROWS, span, dtype=torch.bool)
    padding[1, -2:] = True
    return {
        "none": {},
        "boolean": {"attn_mask": causal},
        "added": {"attn_mask": torch.randn(LENGTH, span)},
        "by head": {"attn_mask": torch.randn(ROWS * HEADS, LENGTH, span)},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": causal, "key_padding_mask": padding},
        "causal": {"attn_mask": causal, "is_causal": True},
        "causal and padding": {"attn_mask": causal, "key_padding_mask": padding, "is_causal": True},
    }


def same(got, expected, tolerance=None):
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.shape == b.shape
            assert torch.equal(a, b) if tolerance is None else torch.allclose(a, b, atol=tolerance), (a - b).abs().max()


@pytest.mark.parametrize("which", ["self", "cross", "three"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("extra", [{}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_an_update_of_zero_changes_no_bit_whatever_the_arguments(which, batch_first, extra, dtype):
    model = holder(dtype, batch_first=batch_first, **extra)
    arguments = inputs(model, which, dtype)
    plain = copy.deepcopy(model)  # its parameters require gradients: torch takes its plain path
    lorakit.attach(model, LoRAConfig(r=2))
    for mask in masks(LENGTH if which == "self" else SPAN).values():
        mask = {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in mask.items()}
        for need, average in [(True, True), (True, False), (False, True)]:
            settings = {"need_weights": need, "average_attn_weights": average, **mask}
            same(model(*arguments, **settings), plain(*arguments, **settings))


@pytest.mark.parametrize("which", ["self", "cross", "three"])
@pytest.mark.parametrize("batched", [True, False])
def test_active_is_the_dense_update_in_fp64(which, batched):
    model = holder(torch.float64, batch_first=True)
    handle = lorakit.attach(model, LoRAConfig(r=2))
    randomise(handle)
    arguments = inputs(model, which, torch.float64, batched=batched)
    folded = copy.deepcopy(model)
    lorakit.adapters(folded).detach()
    value = handle.extract()
    assert value.factors.keys() == {"attn", "attn.out_proj"}
    assert value.factors["attn"].B.shape == (3 * D, 2)
    for path in value.factors:
        weight_at(folded, path)[0].data += value.delta(path).double()
    padding = torch.zeros(ROWS, LENGTH if which == "self" else SPAN, dtype=torch.bool)
    padding[0, -1] = True
    settings = {"key_padding_mask": padding if batched else padding[0]}
    same(model(*arguments, **settings), folded(*arguments, **settings), 1e-6)
    assert (model(*arguments)[0] - plain_output(model, handle, arguments)).abs().max() > 0.01


def plain_output(model, handle, arguments):
    with handle.disabled():
        return model(*arguments)[0]


def test_dropout_of_the_attention_is_drawn_as_torch_draws_it():
    model = holder(dropout=0.3)
    plain = copy.deepcopy(model).train()
    lorakit.attach(model, LoRAConfig(r=2))
    model.train()
    arguments = inputs(model, "self")
    for need in (True, False):
        torch.manual_seed(7)
        got = model(*arguments, need_weights=need)
        torch.manual_seed(7)
        same(got, plain(*arguments, need_weights=need))


def test_dropout_of_the_adapter_is_drawn_in_training_alone():
    model = holder()
    handle = lorakit.attach(model, LoRAConfig(r=4, dropout=0.5))
    randomise(handle)
    arguments = inputs(model, "cross")
    with torch.no_grad():
        expected, base = model(*arguments)[0], plain_output(model, handle, arguments)
        assert torch.equal(model(*arguments)[0], expected)
        model.train()
        assert not torch.equal(model(*arguments)[0], expected)
        site, lora, x = site_of(model.attn), model.attn.lorakit_updates["0"].lora, arguments[0]
        mean = torch.stack([lora(site, model.attn, x, x) for _ in range(2000)]).mean(0)
        model.eval()
        undropped = lora(site, model.attn, x, x)
        assert (mean - undropped).norm() < 0.1 * undropped.norm()
        assert not torch.equal(expected, base)


def test_gradients_are_those_of_the_dense_update():
    model = holder(torch.float64)
    handle = lorakit.attach(model, LoRAConfig(r=2, alpha=2.0))
    randomise(handle)
    arguments = inputs(model, "self", torch.float64)
    handle.model.attn.double()
    model(*arguments)[0].square().sum().backward()
    tensors = handle.trainable_tensors()
    got = {name: p.grad.clone() for name, p in tensors.items()}
    leaves = {name: p.detach().clone().requires_grad_() for name, p in tensors.items()}
    plain = holder(torch.float64)
    weights = {
        "attn.in_proj_weight": plain.attn.in_proj_weight + leaves["attn.B"] @ leaves["attn.A"],
        "attn.out_proj.weight": plain.attn.out_proj.weight + leaves["attn.out_proj.B"] @ leaves["attn.out_proj.A"],
    }
    torch.func.functional_call(plain, weights, arguments)[0].square().sum().backward()
    for name, leaf in leaves.items():
        assert torch.allclose(got[name], leaf.grad, rtol=1e-9), name


@pytest.mark.parametrize("settings", [{"kdim": 8}, {"kdim": 8, "vdim": 10, "batch_first": True}])
def test_separate_projections_are_refused_by_name_but_their_output_can_be_adapted(settings):
    model = holder(**settings)
    with pytest.raises(TargetError, match=r"attn: MultiheadAttention with kdim or vdim .* exclude it"):
        lorakit.attach(model, LoRAConfig(r=2))
    plain = copy.deepcopy(model)
    handle = lorakit.attach(model, LoRAConfig(r=2, exclude_modules=("attn",)))
    arguments = inputs(model, "three")
    same(model(*arguments), plain(*arguments), 1e-6)
    randomise(handle)
    output = model(*arguments)[0]
    plain.attn.out_proj.weight.data += handle.extract().delta("attn.out_proj")
    assert torch.allclose(output, plain(*arguments)[0], atol=1e-5)
    handle.detach()
    assert type(model.attn) is nn.MultiheadAttention


@pytest.mark.parametrize(
    ("changes", "paths"),
    [
        ({}, {"attn", "attn.out_proj"}),
        ({"target_modules": ("attn",)}, {"attn", "attn.out_proj"}),
        ({"target_modules": r"attn"}, {"attn", "attn.out_proj"}),
        ({"target_modules": ("out_proj",)}, {"attn.out_proj"}),
        ({"exclude_modules": ("attn",)}, {"attn.out_proj"}),
        ({"exclude_modules": ("out_proj",)}, {"attn"}),
        ({"rank_pattern": {"attn": 3}}, {"attn", "attn.out_proj"}),
    ],
)
def test_what_names_mean(changes, paths):
    model = holder()
    handle = lorakit.attach(model, LoRAConfig(r=2, **changes))
    value = handle.extract()
    assert value.factors.keys() == paths
    assert {f.r for f in value.factors.values()} == {3 if "rank_pattern" in changes else 2}
    randomise(handle)
    arguments = inputs(model, "self")
    folded = holder()
    for path in paths:
        weight_at(folded, path)[0].data += handle.extract().delta(path)
    assert torch.allclose(model(*arguments)[0], folded(*arguments)[0], atol=1e-4)
    assert torch.allclose(handle.merge(minimum_survival=0)(*arguments)[0], folded(*arguments)[0], atol=1e-4)


def test_attentions_that_are_not_torchs_own_are_refused():
    class Louder(nn.MultiheadAttention):
        def forward(self, *args, **kwargs):
            output, weights = super().forward(*args, **kwargs)
            return 2 * output, weights

    model = nn.Sequential(Louder(D, HEADS), nn.Linear(D, D))
    for name in ("0", "0.out_proj"):
        with pytest.raises(TargetError, match="only torch's own MultiheadAttention"):
            lorakit.attach(model, LoRAConfig(r=2, target_modules=(name,)))


@pytest.mark.parametrize("changes", [{"bias": "all"}, {"bias": "lora_only"}, {"modules_to_save": ("out_proj",)}])
def test_trained_biases_and_whole_output_projections_are_heeded(changes):
    """torch's forward would pass the output projection's by."""
    model = holder()
    handle = lorakit.attach(model, LoRAConfig(r=2, target_modules="attn", **changes))
    names = {"attn.bias", "attn.out_proj.bias"} if "bias" in changes else {"attn.out_proj.weight"}
    assert names <= handle.trainable_tensors().keys()
    randomise(handle)
    arguments = inputs(model, "cross")
    output = model(*arguments)[0]
    output.sum().backward()
    assert all(handle.trainable_tensors()[name].grad.any() for name in names)
    with handle.merged():
        assert torch.allclose(model(*arguments)[0], output, atol=1e-4)
    handle.detach()
    assert type(model.attn) is nn.MultiheadAttention


def test_biases_that_are_keys_are_refused_by_name():
    with pytest.raises(TargetError, match=r"bias_k of the MultiheadAttention at attn"):
        lorakit.attach(holder(add_bias_kv=True), LoRAConfig(r=2, bias="all"))


@pytest.mark.parametrize(("batch_first", "rows"), list(itertools.product([True, False], [3, LENGTH])))
def test_rows_of_torchs_transformer_are_routed_however_they_lie(batch_first, rows):
    """Sequence first, with as many tokens as rows too: nothing in the shapes tells which is which."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(D, 2, 16, dropout=0.0, batch_first=batch_first)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    settings = {"custom_encoder": encoder, "batch_first": batch_first, "dropout": 0.0}
    model = nn.Transformer(D, 2, num_decoder_layers=1, dim_feedforward=16, **settings).double().eval()
    handle = lorakit.attach(model, LoRAConfig(r=2), name="a")
    handle.add("b", LoRAConfig(r=3), seed=1)
    randomise(handle, "a"), randomise(handle, "b")
    source, target = torch.randn(rows, LENGTH, D).double(), torch.randn(rows, 4, D).double()

    def run():
        turn = (lambda x: x) if batch_first else (lambda x: x.transpose(0, 1))
        return turn(model(turn(source), turn(target)))

    names = ["b", None, "a", "b", "b"][:rows]
    expected = []
    for row, name in enumerate(names):
        handle.activate(name)
        expected.append(run()[row])
    with handle.route(names):
        assert torch.allclose(run(), torch.stack(expected), atol=1e-5)
        with torch.no_grad():
            assert torch.allclose(run(), torch.stack(expected), atol=1e-5)
    with handle.route(["a"] * (rows + 1)), pytest.raises(AdapterError, match="the route names"):
        run()


def test_nested_tensors_and_a_hint_without_its_mask_are_errors():
    model = holder(batch_first=True)
    lorakit.attach(model, LoRAConfig(r=2))
    x = torch.randn(ROWS, LENGTH, D)
    with pytest.raises(AdapterError, match="is_causal is a hint about attn_mask"):
        model(x, x, x, is_causal=True)
    nested = torch.nested.nested_tensor([torch.randn(n, D) for n in (2, 3)], layout=torch.jagged)
    with pytest.raises(AdapterError, match="nested tensors cannot be adapted"):
        model(nested, nested, nested)


def test_without_gradients_nothing_passes_the_adapter_by():
    """In eval mode, where nothing requires a gradient, torch's encoder and attention take their fast paths."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, 16, batch_first=True), 2).eval()
    handle = lorakit.attach(model, LoRAConfig(r=2, target_modules=("self_attn",)))
    randomise(handle)
    x = torch.randn(ROWS, LENGTH, D)
    expected = model(x).detach()
    with torch.inference_mode():
        assert torch.allclose(model(x), expected, atol=1e-6)
        with handle.disabled():
            assert not torch.allclose(model(x), expected, atol=1e-3)
