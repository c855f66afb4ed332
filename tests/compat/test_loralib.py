"""The facade beside loralib itself: same seed, same numbers; and the places where loralib is wrong."""

import copy
import inspect

import loralib
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lorakit.compat.loralib as ours
from lorakit.errors import ConfigError

LAYERS = {
    "linear": lambda lora: lora.Linear(12, 20, r=4, lora_alpha=6),
    "linear dropout": lambda lora: lora.Linear(12, 20, r=4, lora_alpha=6, lora_dropout=0.3),
    "linear transposed": lambda lora: lora.Linear(12, 20, r=4, lora_alpha=6, fan_in_fan_out=True, bias=False),
    "linear plain": lambda lora: lora.Linear(12, 20),
    "merged": lambda lora: lora.MergedLinear(12, 24, r=3, lora_alpha=6, enable_lora=[True, False, True]),
    "merged transposed": lambda lora: lora.MergedLinear(
        12, 24, r=3, lora_dropout=0.2, enable_lora=[False, True], fan_in_fan_out=True
    ),
    "embedding": lambda lora: lora.Embedding(30, 10, r=4, lora_alpha=6, padding_idx=0, scale_grad_by_freq=True),
    "convolution": lambda lora: lora.Conv2d(6, 8, 3, r=4, lora_alpha=6, padding=1, padding_mode="circular"),
    "convolution of groups": lambda lora: lora.Conv2d(6, 8, 3, r=2, groups=2, stride=2),
    "convolution plain": lambda lora: lora.Conv1d(6, 8, 3),
    "convolution 1d": lambda lora: lora.Conv1d(6, 8, 1, r=2),
    "convolution 3d": lambda lora: lora.Conv3d(6, 8, 1, r=2, bias=False),
}
with_layers = pytest.mark.parametrize("name", LAYERS)


def build(lora, name):
    torch.manual_seed(0)
    return LAYERS[name](lora)


def input_of(name):
    torch.manual_seed(1)
    if name == "embedding":
        return torch.randint(0, 30, (2, 7))
    if name.startswith("convolution"):
        dims = 1 if "1d" in name or "plain" in name else 3 if "3d" in name else 2
        return torch.randn(2, 6, *[9] * dims)
    return torch.randn(2, 5, 12)


def test_the_public_names_and_arguments_are_loralibs():
    names = {n for n, v in vars(loralib).items() if getattr(v, "__module__", "").startswith("loralib.")}
    assert names == set(ours.__all__)
    for name in sorted(names):
        theirs, mine = (inspect.signature(getattr(lora, name)).parameters for lora in (loralib, ours))
        assert list(theirs) == list(mine)
        for argument, parameter in theirs.items():
            default = parameter.default
            assert mine[argument].default == (tuple(default) if isinstance(default, list) else default)


@with_layers
def test_layers_start_as_loralibs_and_have_its_state_dict(name):
    theirs, mine = build(loralib, name), build(ours, name)
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, mine.state_dict()[key])
    assert list(theirs.state_dict()) == list(mine.state_dict())
    flags = {n: p.requires_grad for n, p in theirs.named_parameters()}
    assert flags == {n: p.requires_grad for n, p in mine.named_parameters()}
    for attribute in ("r", "lora_alpha", "merge_weights", "merged"):
        assert getattr(theirs, attribute) == getattr(mine, attribute)
    assert getattr(theirs, "scaling", None) == getattr(mine, "scaling", None)
    assert isinstance(mine, ours.LoRALayer)


@with_layers
def test_forward_and_gradients_are_loralibs_in_both_modes(name):
    theirs, mine = build(loralib, name), build(ours, name)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "lora_" in key:
                parameter.normal_(0, 0.3)
    mine.load_state_dict(theirs.state_dict())
    x = input_of(name)
    outputs = []
    for layer in (theirs, mine):
        torch.manual_seed(5)  # dropout
        y = layer(x)
        y.pow(2).sum().backward()
        outputs.append(y)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    for key, parameter in mine.named_parameters():
        expected = theirs.get_parameter(key).grad
        assert (parameter.grad is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-4)
    assert theirs.eval() is None or not theirs.r
    assert mine.eval() is mine
    torch.testing.assert_close(mine(x), theirs(x), rtol=1e-5, atol=1e-5)
    if mine.r:  # theirs is merged now
        key = "conv.weight" if "convolution" in name else "weight"
        torch.testing.assert_close(mine.get_parameter(key) + mine.delta(), theirs.get_parameter(key))


# ---------------------------------------------------------------- a script, its import line changed

SCRIPT = """
import loralib as lora
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(0)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = lora.Embedding(40, 16, r=4, lora_alpha=8)
        self.attention = lora.MergedLinear(16, 48, r=4, lora_alpha=8, lora_dropout=0.1, enable_lora=[True, False, True])
        self.out = lora.Linear(16, 16, r=4, lora_alpha=8, lora_dropout=0.1)
        self.conv = lora.Conv2d(1, 4, 3, r=2, lora_alpha=4, padding=1, bias=False)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 40)

    def forward(self, ids):
        h = self.embed(ids)
        q, k, v = self.attention(self.norm(h)).chunk(3, -1)
        h = h + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        h = h + self.conv(h[:, None]).mean(1)
        return self.head(h)

model = Model()
lora.mark_only_lora_as_trainable(model, bias=BIAS)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
losses = []
for step in range(20):
    ids = torch.randint(0, 40, (4, 9))
    loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    if step % 7 == 6:
        model.eval()
        with torch.no_grad():
            losses.append(model(ids).logsumexp(-1).mean().item())
        model.train()
saved = {k: v.clone() for k, v in lora.lora_state_dict(model, bias=BIAS).items()}
model.load_state_dict(saved, strict=False)
"""


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_a_script_with_its_import_line_changed_gives_the_same_numbers(bias):
    results = []
    for line in ("import loralib as lora", "import lorakit.compat.loralib as lora"):
        namespace = {"BIAS": bias, "__name__": "script"}
        exec(compile(SCRIPT.replace("import loralib as lora", line), line, "exec"), namespace)  # noqa: S102
        results.append(namespace)
    theirs, mine = results
    torch.testing.assert_close(torch.tensor(mine["losses"]), torch.tensor(theirs["losses"]), rtol=1e-4, atol=1e-5)
    assert mine["saved"].keys() == theirs["saved"].keys()
    trainable = [{n for n, p in ns["model"].named_parameters() if p.requires_grad} for ns in results]
    assert trainable[1] == trainable[0]
    for key, tensor in theirs["saved"].items():  # Adam makes steps of full size of gradients that are rounding alone
        torch.testing.assert_close(mine["saved"][key], tensor, rtol=0, atol=1e-2)
    fresh = mine["Model"]()
    assert not fresh.load_state_dict(theirs["saved"], strict=False).unexpected_keys


# ---------------------------------------------------------------- where loralib is wrong


@pytest.mark.parametrize("name", ["linear", "merged", "embedding", "convolution"])
def test_modes_never_touch_a_weight(name):
    layer = build(ours, name)
    with torch.no_grad():
        layer.lora_A.normal_()
        layer.lora_B.normal_()
    before = copy.deepcopy(layer.state_dict())
    for _ in range(50):
        layer.eval()
        layer.train()
    assert all(torch.equal(before[key], tensor) for key, tensor in layer.state_dict().items())
    layer.eval()
    layer.load_state_dict(before)  # in loralib: onto merged weights, from which train() then subtracts
    layer.train()
    assert all(torch.equal(before[key], tensor) for key, tensor in layer.state_dict().items())


def test_an_embedding_keeps_the_weight_it_is_given():
    weight = torch.randn(30, 10)
    assert not torch.equal(loralib.Embedding(30, 10, r=2, _weight=weight.clone()).weight, weight)
    layer = ours.Embedding(30, 10, r=2, _weight=weight.clone())
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer.lora_A, torch.zeros(2, 30))
    assert layer.lora_B.any()
    assert torch.equal(ours.Embedding.from_pretrained(weight.clone(), freeze=False).weight, weight)


def test_dropout_of_a_convolution_is_applied():
    layer = ours.Conv2d(6, 8, 3, r=4, lora_dropout=0.5)
    nn.init.normal_(layer.lora_B)
    x = input_of("convolution")
    torch.manual_seed(3)
    mask = F.dropout(torch.ones_like(x), 0.5)
    torch.manual_seed(3)
    y = layer(x)
    expected = layer.conv(x) + F.conv2d(x * mask, layer.delta())
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(layer.eval()(x), F.conv2d(x, layer.conv.weight + layer.delta(), layer.conv.bias))


def test_lora_only_means_the_biases_of_convolutions_too():
    for lora, expected in ((loralib, {"a.lora_A", "a.lora_B"}), (ours, {"a.lora_A", "a.lora_B", "a.conv.bias"})):
        model = nn.ModuleDict({"a": lora.Conv2d(4, 4, 3, r=1)})
        lora.mark_only_lora_as_trainable(model, "lora_only")
        assert {n for n, p in model.named_parameters() if p.requires_grad} == expected
        assert lora.lora_state_dict(model, "lora_only").keys() == expected


def test_bias_means_parameters_called_bias():
    model = nn.ModuleDict({"relative_bias": nn.Embedding(4, 4), "a": ours.Linear(4, 4, r=1), "n": nn.LayerNorm(4)})
    assert ours.lora_state_dict(model, "all").keys() == {"a.bias", "a.lora_A", "a.lora_B", "n.bias"}
    ours.mark_only_lora_as_trainable(model, "all")
    assert not model["relative_bias"].weight.requires_grad
    assert model["n"].bias.requires_grad
    alone = ours.Linear(4, 4, r=1)
    assert ours.lora_state_dict(alone, "lora_only").keys() == {"bias", "lora_A", "lora_B"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ours.Linear(4, 4, r=-1), "r: must not be negative"),
        (lambda: ours.MergedLinear(4, 10, r=1, enable_lora=[True, True, True]), "3 entries, which do not divide 10"),
        (lambda: ours.MergedLinear(4, 10, r=1, enable_lora=[]), "0 entries"),
        (lambda: ours.Embedding(4, 4, r=1, max_norm=1.0), "max_norm"),
        (lambda: ours.Conv2d(4, 4, (3, 1), r=1), "kernel_size: one number"),
        (lambda: ours.Conv1d(4, 4, 3, r=1), "make no weight of shape"),
        (lambda: ours.Conv3d(4, 4, 3, r=1), "use lorakit.attach"),
        (lambda: ours.lora_state_dict(nn.Linear(1, 1), "some"), "got 'some'"),
        (lambda: ours.mark_only_lora_as_trainable(nn.Linear(1, 1), "some"), "got 'some'"),
    ],
)
def test_what_would_fail_later_or_silently_is_refused_at_once(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_merged_linear_without_updates_is_a_plain_layer():
    layer = ours.MergedLinear(4, 8, r=2, enable_lora=[False, False])
    x = torch.randn(3, 4)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert layer.weight.requires_grad
