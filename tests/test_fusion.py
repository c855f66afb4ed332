"""What runs fast computes what the model's own code computes; what differs in one operation is left alone."""

import contextlib
import functools

import pytest
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb, rotate_half

import lorakit
from lorakit import LoRAConfig
from lorakit.fusion import KEEP, _same_code, fused, keeps
from tiny_models import SMALL

MODELS = {  # and how many of its modules run fast: norms, SwiGLU blocks, attentions with rotary, last layers
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**SMALL)), 5 + 2 + 2 + 1),
    "qwen3: norms of q and k too": (lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL)), 9 + 2 + 2 + 1),
    "mixtral: experts are no SwiGLU block": (
        lambda: MixtralForCausalLM(MixtralConfig(**SMALL, experts_implementation="eager")),
        5 + 0 + 2 + 0,
    ),
    "gemma2: its norm adds one, its block is GeGLU": (lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL)), 0 + 0 + 2 + 0),
    "llama with GELU": (lambda: LlamaForCausalLM(LlamaConfig(**SMALL, hidden_act="gelu")), 5 + 0 + 2 + 1),
}


def loss_and_gradient(model, handle):
    ids = torch.arange(3, 40)[None]
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return torch.cat([loss.detach().view(1), *(p.grad.flatten() for p in handle.trainable_parameters())]).double()


@pytest.mark.parametrize(("make", "count"), MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_fast_is_as_near_to_the_exact_result_as_the_models_own_code(make, count, dtype):
    torch.manual_seed(0)
    model = make().to(dtype)
    handle = lorakit.attach(model, LoRAConfig(r=4))
    for parameter in handle.trainable_parameters():
        nn.init.normal_(parameter, std=0.1)
    plain = loss_and_gradient(model, handle)
    with fused(model) as modules:
        fast = loss_and_gradient(model, handle)
    assert modules == count
    model.double()  # Llama's norm still rounds to fp32 inside
    exact = loss_and_gradient(model, handle)
    assert (fast - exact).norm() <= 1.2 * (plain - exact).norm() + 1e-6 * exact.norm()


def test_the_models_own_code_is_back_whatever_is_raised():
    model = MODELS["llama"][0]()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(ZeroDivisionError), fused(model):
        raise ZeroDivisionError
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


class SlightlyOther(nn.Module):
    """As LlamaRMSNorm but for a constant."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4), requires_grad=False)
        self.variance_epsilon = 1e-6

    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(3).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


def test_other_code_and_other_hooks_are_left_alone():
    taken = LlamaRMSNorm(4)
    taken.forward = lambda x: x
    with fused(nn.ModuleList([SlightlyOther(), taken])) as modules:
        assert modules == 0
    assert "forward" in vars(taken)


def test_a_norm_that_is_trained_has_its_gradient():
    norm = LlamaRMSNorm(4)
    with fused(norm) as modules:
        assert modules == 1
        norm(torch.randn(2, 4)).sum().backward()
    assert norm.weight.grad is not None


def with_defaults(q, k, cos, sin, unsqueeze_dim=2):  # as Llama's but for the default
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    q_embed = (q * cos) + (rotate_half(q) * sin)
    k_embed = (k * cos) + (rotate_half(k) * sin)
    return q_embed, k_embed


def test_what_a_decorator_wraps_counts():
    def decorated(function):
        @functools.wraps(function)
        def wrapper(*args):
            return function(*args)

        return wrapper

    assert _same_code(decorated(rotate_half), decorated(rotate_half))
    assert not _same_code(decorated(rotate_half), decorated(apply_rotary_pos_emb))
    assert not _same_code(decorated(rotate_half), rotate_half)


@pytest.mark.parametrize("name", ["llama", "qwen3: norms of q and k too"])
def test_the_last_layer_goes_on_only_where_it_is_read(name):
    torch.manual_seed(0)
    model = MODELS[name][0]()
    handle = lorakit.attach(model, LoRAConfig(r=4, init="random"))
    ids, places = torch.arange(3, 40)[None], torch.tensor([2, 3, 30])
    results = []
    for fast in (False, True):
        with fused(model) if fast else contextlib.nullcontext():
            assert keeps(model) == fast
            logits = model(input_ids=ids, **({KEEP: places} if fast else {})).logits
        logits = logits if fast else logits[:, places]
        gradients = torch.autograd.grad(logits.sin().sum(), handle.trainable_parameters(), allow_unused=True)
        results.append([logits, *(g for g in gradients if g is not None)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_last_layer_that_is_checkpointed_is_left_alone():
    model = MODELS["llama"][0]()
    model.activation_checkpointing_enable()
    with fused(model):
        assert not keeps(model)


def test_functions_are_equal_only_in_every_part():
    def named_otherwise(query, k, cos, sin, unsqueeze_dim=1):
        cos = cos.unsqueeze(unsqueeze_dim)
        sin = sin.unsqueeze(unsqueeze_dim)
        q_embed = (query * cos) + (rotate_half(query) * sin)
        k_embed = (k * cos) + (rotate_half(k) * sin)
        return q_embed, k_embed

    assert _same_code(apply_rotary_pos_emb, apply_rotary_pos_emb)
    assert not _same_code(with_defaults, apply_rotary_pos_emb)
    assert not _same_code(named_otherwise, apply_rotary_pos_emb)
    assert not _same_code(apply_rotary_pos_emb, nn.Identity())  # what it becomes where `kernels` is installed
    assert not _same_code(nn.Identity(), apply_rotary_pos_emb)


def nodes(loss):
    """Names of the autograd nodes behind a loss, each as often as it is there."""
    seen, names, open_ = set(), [], [loss.grad_fn]
    while open_:
        node = open_.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.append(node.name())
            open_ += [parent for parent, _ in node.next_functions]
    return names


def test_layers_given_the_same_tensor_compute_together():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    handle = lorakit.attach(model, LoRAConfig(r=4, init="random"))
    ids = torch.arange(3, 40)[None]
    plain = loss_and_gradient(model, handle)
    with fused(model):
        for _ in range(2):
            with fused(model):  # as evaluations within a training loop do
                model.eval()(input_ids=ids)
            assert sum("LoRALinears" in name for name in nodes(model(input_ids=ids, labels=ids).loss)) == 2 * 4
        torch.testing.assert_close(loss_and_gradient(model, handle), plain, rtol=1e-4, atol=1e-5)
    assert sum("LoRALinears" in name for name in nodes(model(input_ids=ids, labels=ids).loss)) == 2 * 7


class Crossing(nn.Module):
    """Attention from one sequence to another, by the usual names."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(6, 6) for _ in range(3))
        self.rms = LlamaRMSNorm(6)

    def forward(self, x, y):
        return self.q_proj(x) @ self.k_proj(y).T @ self.v_proj(y)


def test_layers_given_other_tensors_than_their_names_say_compute_alone():
    torch.manual_seed(0)
    model = Crossing()
    lorakit.attach(model, LoRAConfig(r=2, init="random"))
    x, y = torch.randn(4, 6), torch.randn(5, 6)
    plain = model(x, y)
    with fused(model):
        for _ in range(2):
            torch.testing.assert_close(model(x, y), plain)
        torch.testing.assert_close(model(x, x), model(x, x.clone()))
        assert model.k_proj.lorakit_shared is None


def test_a_tensor_that_changed_in_between_is_another():
    torch.manual_seed(0)
    model = Crossing()
    lorakit.attach(model, LoRAConfig(r=2, init="random"))
    with fused(model), torch.no_grad():
        expected = model.k_proj(torch.ones(1, 6))
    with fused(model):
        x = torch.zeros(1, 6)
        model.q_proj(x)
        x += 1
        torch.testing.assert_close(model.k_proj(x), expected)


def test_another_adapter_for_the_second_layer_is_seen():
    torch.manual_seed(0)
    model = Crossing()
    handle = lorakit.attach(model, LoRAConfig(r=2, init="random"))
    x = torch.randn(1, 6)
    with fused(model):
        model.q_proj(x)
        with handle.disabled():
            base = model.k_proj(x)
        assert torch.equal(base, nn.functional.linear(x, model.k_proj.weight, model.k_proj.bias))
