"""Stacked experts with adapters, on every way transformers stores and runs them."""

import threading

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)
from transformers.integrations.moe import use_experts_implementation

import lorakit
from adapter.models import EXPERTS, mixtral, qwen3_moe, randomise
from lorakit import LoRAConfig
from lorakit.core.experts import experts_site, mixture, why_not
from lorakit.data.batches import collate
from lorakit.errors import TargetError
from lorakit.fusion import fused
from lorakit.packing import packed_attention, packed_logits
from tiny_models import SMALL

WIDE = {**SMALL, "initializer_range": 0.1}


def gpt_oss(**changes):
    """Stacks that lie (experts, in, out), with biases and a gate of its own."""
    return GptOssForCausalLM(GptOssConfig(**WIDE, num_local_experts=4, num_experts_per_tok=2, **changes))


def deepseek(**changes):
    sizes = {k: v for k, v in WIDE.items() if k not in ("head_dim", "num_key_value_heads")}
    sizes |= {"num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    sizes |= {"qk_rope_head_dim": 4, "first_k_dense_replace": 1, "n_routed_experts": 8, "n_group": 2, "topk_group": 1}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, num_experts_per_tok=2, moe_intermediate_size=24, **changes))


MODELS = {
    "mixtral": mixtral,
    "qwen2 moe": lambda **k: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**WIDE, num_experts=6, moe_intermediate_size=24, shared_expert_intermediate_size=16, **k)
    ),
    "qwen3 moe": qwen3_moe,
    "olmoe": lambda **k: OlmoeForCausalLM(OlmoeConfig(**WIDE, num_experts=6, num_experts_per_tok=3, **k)),
    "deepseek v3": deepseek,
    "gpt-oss": gpt_oss,
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
IDS = torch.arange(40).view(4, 10) * 7 % 97


def build(make, **changes):
    torch.manual_seed(0)
    return make(**changes).eval()


def adapted(make, dtype=torch.float32, **changes):
    model = build(make, experts_implementation="eager").to(dtype)
    settings = {"r": 3, "alpha": 6.0, "target_modules": (), "target_parameters": EXPERTS}
    handle = lorakit.attach(model, LoRAConfig(**settings | changes))
    randomise(handle)
    return model, handle


@every_model
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_active_equals_folded_in(make, implementation):
    model, handle = adapted(make)
    model.set_experts_implementation(implementation)
    with torch.no_grad():
        active = model(IDS).logits
        with handle.disabled():
            base = model(IDS).logits
        assert torch.equal(model(IDS).logits, active)
        with handle.merged():
            folded = model(IDS).logits
    assert (active - folded).norm() < 1e-5 * folded.norm()
    assert (active - base).norm() > 0.01 * base.norm()


@every_model
def test_an_update_of_zero_changes_no_bit(make):
    model = build(make, experts_implementation="eager")
    expected = model(IDS).logits
    lorakit.attach(model, LoRAConfig(r=2, target_modules=(), target_parameters=EXPERTS))
    if make is gpt_oss:  # multiplies by stacks that lie the other way round
        assert torch.allclose(model(IDS).logits, expected, atol=1e-6)
    else:
        assert torch.equal(model(IDS).logits, expected)


@every_model
def test_gradients_are_those_of_the_dense_update(make):
    model, handle = adapted(make, torch.float64)
    x = torch.randn(9, 32, dtype=torch.float64, requires_grad=True)
    path, experts = next((n, m) for n, m in model.named_modules() if type(m).__name__.endswith("Experts"))
    index = torch.stack([torch.randperm(experts.num_experts)[:2] for _ in range(9)])
    scores = torch.rand(9, 2, dtype=torch.float64)
    experts(x, index, scores).square().sum().backward()
    names = [n for n in handle.trainable_tensors() if n.startswith(f"{path}.")]
    got, got_x, x.grad = {n: handle.trainable_tensors()[n].grad for n in names}, x.grad, None
    assert len(names) == 4
    leaves = {n: handle.trainable_tensors()[n].detach().double().requires_grad_() for n in names}
    plain = build(make, experts_implementation="eager").double().get_submodule(path)
    weights = {}
    for name in ("gate_up_proj", "down_proj"):
        update = leaves[f"{path}.{name}.B"] @ leaves[f"{path}.{name}.A"] * 2.0
        weights[name] = plain.get_parameter(name).detach() + (update.mT if plain.is_transposed else update)
    torch.func.functional_call(plain, weights, (x, index, scores)).square().sum().backward()
    assert torch.allclose(got_x, x.grad)
    for name, leaf in leaves.items():
        assert torch.allclose(got[name].to(leaf), leaf.grad, rtol=1e-4, atol=1e-5 * float(leaf.grad.abs().max())), name


def test_a_token_pays_for_its_own_experts_alone():
    """Multiplications: those of the low-rank products of the chosen experts, and no dense update."""
    r, tokens, k = 2, 40, 2
    counts = {}
    for active in (True, False):
        model, handle = adapted(qwen3_moe, r=r, dropout=0.1)  # without, the products are made in place and not counted
        model.train()
        handle.activate("default" if active else None)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(IDS)
        counts[active] = counter.get_total_flops()
    d, f = 32, 24
    layers, multiply_add = 2, 2
    assert counts[True] - counts[False] == layers * multiply_add * tokens * k * r * ((d + 2 * f) + (f + d))


def test_experts_nobody_chose_get_no_gradient_and_unknown_ones_count_for_nothing():
    model, handle = adapted(mixtral)
    experts = model.model.layers[0].mlp.experts
    x, scores = torch.randn(5, 32), torch.rand(5, 2)
    experts(x, torch.tensor([[0, 2]] * 5), scores).sum().backward()
    gradient = handle.trainable_tensors()["model.layers.0.mlp.experts.gate_up_proj.A"].grad
    assert [bool(g.any()) for g in gradient] == [True, False, True, False]
    beyond = experts(x, torch.tensor([[0, 4]] * 5), scores)
    only = experts(x, torch.tensor([[0, 1]] * 5), scores * torch.tensor([1.0, 0.0]))
    assert torch.allclose(beyond, only, atol=1e-6)
    assert experts(x[:0], torch.zeros(0, 2, dtype=torch.long), scores[:0]).shape == (0, 32)


def test_dropout_is_drawn_in_training_alone():
    model, handle = adapted(mixtral, dropout=0.5)
    expected = model(IDS).logits
    assert torch.equal(model(IDS).logits, expected)
    model.train()
    first, second = model(IDS).logits, model(IDS).logits
    assert not torch.allclose(first, second)
    first.sum().backward()
    assert all(p.grad is not None for p in handle.trainable_parameters())


@every_model
def test_a_route_over_several_adapters_of_different_targets(make):
    model, handle = adapted(make)
    other = ("q_proj",) if make is mixtral else ()
    handle.add("down", LoRAConfig(r=2, target_modules=other, target_parameters=EXPERTS[1:]))
    randomise(handle, "down")
    names = ["down", None, "default", "down"]
    expected = []
    for row, name in enumerate(names):
        handle.activate(name)
        expected.append(model(IDS[row : row + 1]).logits[0])
    with handle.route(names):
        assert torch.allclose(model(IDS).logits, torch.stack(expected), atol=1e-4)
        with torch.no_grad():
            out = model(IDS, use_cache=True)
            step = model(IDS[:, :1], past_key_values=out.past_key_values).logits  # one token a row
    assert step.shape == (4, 1, 97)
    handle.activate({"default": 0.5, "down": -1.5})
    both = model(IDS).logits
    with handle.merged():
        assert torch.allclose(model(IDS).logits, both, atol=1e-4)


def test_threads_each_compute_with_their_own():
    model, handle = adapted(mixtral)
    handle.add("other", LoRAConfig(r=2, target_modules=(), target_parameters=EXPERTS))
    randomise(handle, "other")
    expected, wrong = {}, []
    with torch.no_grad():
        for name in ("default", "other", None):
            handle.activate(name)
            expected[name] = model(IDS).logits
    barrier = threading.Barrier(3)

    def work(name):
        barrier.wait()
        with torch.no_grad(), handle.route([name] * 4):
            wrong.extend(name for _ in range(5) if not torch.allclose(model(IDS).logits, expected[name], atol=1e-4))

    threads = [threading.Thread(target=work, args=(name,)) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("make", [mixtral, qwen3_moe])
def test_packed_and_fused_compute_what_rows_alone_compute(make):
    model, handle = adapted(make, target_modules="all-linear")

    class Row:
        def __init__(self, n):
            self.ids, self.trained = list(range(3, 3 + n)), [False, *[True] * (n - 1)]

    batch = collate([Row(n) for n in (5, 30, 17)], range(3))

    def run():
        model.zero_grad()
        logits = packed_logits(model, batch)
        logits.sin().sum().backward()
        return logits.detach(), torch.cat([p.grad.flatten() for p in handle.trainable_parameters()])

    alone = run()
    with fused(model), packed_attention(model, 400) as packs:
        assert packs
        packed = run()
    for a, b in zip(packed, alone, strict=True):
        assert (a - b).norm() < 1e-4 * b.norm()


# ---------------------------------------------------------------- which modules


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_parameters": ("gate_up_porj",)}, r"'gate_up_porj': matches no parameter; did you mean gate_up_proj"),
        ({"target_parameters": ("experts.up_proj",)}, r"matches no parameter; did you mean .*experts\.down_proj"),
        ({"target_parameters": ("q_proj.weight",)}, r"q_proj\.weight: its module is in target_modules too"),
        ({"target_parameters": ("norm.weight",)}, r"norm\.weight: is no matrix and no stack of them"),
        ({"target_parameters": ("gate.weight",), "dropout": 0.1}, r"dropout: .*gate\.weight cannot have any"),
        ({"target_parameters": EXPERTS, "exclude_modules": ("down_prj",)}, r"exclude_modules 'down_prj'.*down_proj"),
        ({"target_modules": (), "target_parameters": ()}, r"target_modules: is empty"),
    ],
)
def test_what_cannot_be_meant_is_an_error_with_the_nearest_name(changes, message):
    with pytest.raises(lorakit.errors.LorakitError, match=message):
        lorakit.attach(build(mixtral), LoRAConfig(**{"r": 2, **changes}))


def test_all_linear_leaves_stacks_alone_and_patterns_and_layers_reach_them():
    assert not any("experts" in path for path in lorakit.attach(build(mixtral), LoRAConfig(r=2)).extract().factors)
    config = LoRAConfig(r=2, target_modules=(), target_parameters=EXPERTS, layers=(1,), rank_pattern={"down_proj": 5})
    value = lorakit.attach(build(mixtral), config).extract()
    prefix = "model.layers.1.mlp.experts"
    assert {path: f.r for path, f in value.factors.items()} == {f"{prefix}.gate_up_proj": 2, f"{prefix}.down_proj": 5}
    assert value.factors[f"{prefix}.down_proj"].A.shape == (4, 5, 48)
    assert value.delta(f"{prefix}.down_proj").shape == (4, 32, 48)
    folded = value.folded(uniform_rank=True)
    assert folded.factors[f"{prefix}.gate_up_proj"].r == 5
    assert torch.allclose(folded.delta(f"{prefix}.gate_up_proj"), value.delta(f"{prefix}.gate_up_proj"))


@pytest.mark.parametrize("targets", [EXPERTS, ("router.weight",), ("q_proj.weight", "experts.down_proj")])
def test_other_parameters_are_folded_in_for_each_pass(targets):
    torch.manual_seed(0)
    model = Llama4ForCausalLM(Llama4TextConfig(**SMALL, intermediate_size_mlp=32, num_local_experts=2)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    ids = torch.arange(6).view(2, 3)
    before = model(ids).logits
    config = LoRAConfig(r=2, target_modules=(), target_parameters=targets, init="random")
    handle = lorakit.attach(model, config)
    after = model(ids).logits
    assert not torch.allclose(after, before)
    after.sum().backward()
    assert all(tensor.grad is not None for tensor in handle.trainable_tensors().values())
    with handle.merged():
        torch.testing.assert_close(model(ids).logits, after, rtol=1e-4, atol=1e-5)
    with (
        pytest.raises(lorakit.errors.AdapterError, match="rows cannot have their own"),
        handle.route(["default", None]),
    ):
        model(ids)
    value = handle.extract()
    handle.detach()
    assert torch.equal(model(ids).logits, before)
    lorakit.attach(model, value)
    assert torch.equal(model(ids).logits, after)


def test_parameters_that_no_pass_would_use_are_refused():
    class Held(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.table = nn.ParameterDict({"w": torch.zeros(3, 3)}), nn.Parameter(torch.zeros(3, 3))
            self.attention = nn.MultiheadAttention(4, 1)

    for name, message in {
        "inner.w": "is never called itself",
        "table": "top-level module is not supported",
        "out_proj.weight": "is read by a MultiheadAttention",
    }.items():
        with pytest.raises(TargetError, match=message):
            lorakit.attach(Held(), LoRAConfig(r=2, target_modules=(), target_parameters=(name,)))
    linear = nn.Sequential(nn.Linear(3, 3))
    handle = lorakit.attach(linear, LoRAConfig(r=2))
    with pytest.raises(TargetError, match="another adapter has the Linear itself in target_modules"):
        handle.add("other", LoRAConfig(r=2, target_modules=(), target_parameters=("0.weight",)))


def test_experts_that_do_not_keep_to_the_contract_are_found_out():
    @use_experts_implementation
    class Scaled(type(mixtral().model.layers[0].mlp.experts)):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            return 2 * super().forward(hidden_states, top_k_index, top_k_weights)

    model = build(mixtral, experts_implementation="eager")
    for layer in model.model.layers:
        layer.mlp.experts.__class__ = Scaled
    assert experts_site(model.model.layers[0].mlp.experts, "down_proj") is not None
    with pytest.raises(TargetError, match="its experts do not compute what transformers says they do"):
        lorakit.attach(model, LoRAConfig(r=2, target_parameters=EXPERTS))
    assert type(model.model.layers[0].mlp.experts) is Scaled


def test_spread_experts_and_their_biases_are_refused():
    model = build(gpt_oss)
    with pytest.raises(TargetError, match=r"bias 'all': gate_up_proj_bias of the GptOssExperts"):
        lorakit.attach(model, LoRAConfig(r=2, bias="all", target_parameters=EXPERTS))
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    with pytest.raises(TargetError, match="spread over several devices"):
        lorakit.attach(model, LoRAConfig(r=2, target_parameters=EXPERTS))


def test_on_the_meta_device_nothing_is_run():
    with torch.device("meta"):
        model = mixtral()
    assert why_not(model.model.layers[0].mlp.experts) is None


@every_model
def test_the_probe_runs_what_the_module_runs(make):
    experts = next(m for m in build(make).modules() if type(m).__name__.endswith("Experts"))
    nn.init.normal_(experts.down_proj, std=0.5)
    x, scores = torch.randn(7, 32), torch.rand(7, 2)
    index = torch.stack([torch.randperm(experts.num_experts)[:2] for _ in range(7)])
    assert torch.allclose(mixture(experts, (), x, index, scores), experts(x, index, scores), atol=1e-5)
