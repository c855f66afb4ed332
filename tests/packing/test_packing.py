"""Rows packed = rows alone, on every architecture that packs; those that cannot are found and run row by row."""

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import lorakit
from lorakit import LoRAConfig
from lorakit.data.batches import Batch, collate
from lorakit.packing import attention, has_dropout, layout, packed_attention, packed_logits
from tiny_models import SMALL

PACKING = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=97, n_positions=512, bos_token_id=1, eos_token_id=2)
    ),
    "gemma2: softcap and sliding window": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, sliding_window=8)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL)),
    "mistral: sliding window": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=6)),
}


def deepseek(value_dim):
    """Keys and values of different widths."""
    sizes = {k: v for k, v in SMALL.items() if k not in ("head_dim", "num_key_value_heads")}
    config = DeepseekV3Config(
        **sizes,
        num_key_value_heads=4,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=value_dim,
        first_k_dense_replace=2,
    )
    return DeepseekV3ForCausalLM(config)


PACKING |= {f"deepseek: values of {dim}": lambda dim=dim: deepseek(dim) for dim in (8, 20)}
ROW_BY_ROW = {
    "gpt-oss: attention sinks": lambda: GptOssForCausalLM(GptOssConfig(**SMALL, num_local_experts=4, sliding_window=8)),
    "mamba: state space": lambda: MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=97)),
}


def batch(lengths=(5, 30, 31, 33, 60, 260, 261), every=3) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 97, (sum(lengths),), generator=generator)
    positions = torch.cat([torch.arange(n) for n in lengths])
    predict = torch.arange(0, sum(lengths) - 1, every)
    return Batch(
        ids, positions, lengths, (0,) * len(lengths), predict, None, ids[predict + 1], tuple(range(len(lengths)))
    )


class Row:
    def __init__(self, ids, first_target):
        self.ids, self.trained = ids, [i >= first_target for i in range(len(ids))]


def build(make, dtype=torch.float32):
    torch.manual_seed(0)
    return make().to(dtype).eval()


def logits_and_gradient(model, rows: Batch):
    model.zero_grad()
    logits = packed_logits(model, rows)
    logits.float().sin().sum().backward()
    return logits.detach(), torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("make", PACKING.values(), ids=PACKING)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_packed_equals_alone_with_gradients(make, dtype, tolerance):
    model = build(make, dtype)
    alone, gradient_alone = logits_and_gradient(model, batch())
    with packed_attention(model, 400) as packs:
        assert packs
        packed, gradient_packed = logits_and_gradient(model, batch())
    assert (packed - alone).abs().max() <= tolerance * alone.abs().max()
    assert (gradient_packed - gradient_alone).norm() <= tolerance * gradient_alone.norm()


@pytest.mark.parametrize("make", PACKING.values(), ids=PACKING)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_a_shared_beginning_changes_nothing_but_rounding(make, dtype, tolerance):
    model = build(make, dtype)
    generator = torch.Generator().manual_seed(0)

    def some(n):
        return torch.randint(3, 97, (n,), generator=generator).tolist()

    system, question = some(11), some(20)
    answers = [some(n) for n in (4, 9, 9, 9)]
    rows = [Row(system + some(n), 13) for n in (3, 9, 9, 12, 40, 300)]
    rows += [Row(system + question + answer, 31) for answer in [*answers, answers[0] + some(5), some(280)]]
    rows += [Row(system + question + answers[1], 31), Row(some(20), 5)]
    indices = range(len(rows))
    with packed_attention(model, 400):
        together = collate(rows, indices, share=True)
        in_that_order = collate(rows, together.rows)
        assert together.forks.count(0) == 2  # the first row, and the one that shares nothing
        assert (
            max(together.forks) == 38
        )  # a row that is there twice keeps its last token (and the 40th predicts nothing)
        assert len(together.ids) == len(in_that_order.ids) - sum(together.forks)
        shared, gradient_shared = logits_and_gradient(model, together)
    alone, gradient_alone = logits_and_gradient(model, in_that_order)
    assert (shared - alone).abs().max() <= tolerance * alone.abs().max()
    assert (gradient_shared - gradient_alone).norm() <= tolerance * gradient_alone.norm()


@pytest.mark.parametrize("window", [None, 5], ids=["full", "window"])
def test_the_fast_attention_of_short_rows_is_the_plain_one(window):
    heads, kv_heads, dim = 4, 2, 3
    packed = layout.Layout(lengths=(4, 20, 6, 7), forks=(0, 0, 5, 4))
    rows = packed.short(torch.device("cpu"), window, heads, kv_heads)
    torch.manual_seed(0)
    q, k, v = (torch.randn(28, h, dim, dtype=torch.float64, requires_grad=True) for h in (heads, kv_heads, kv_heads))

    def fast(q, k, v):
        return attention._AttendShort.apply(q, k, v, rows, 0.6)

    torch.testing.assert_close(fast(q, k, v), attention._attend_short_plain(q, k, v, rows, 0.6))
    assert torch.autograd.gradcheck(fast, (q, k, v))


def test_rows_of_unlike_size_do_not_attend_together():
    packed = layout.Layout(lengths=(10, 250, 12, 240), forks=(0,) * 4)
    rows = packed.short(torch.device("cpu"), None, 1, 1)
    assert [group.count for group in rows.groups] == [2, 2]
    assert not packed.long
    assert [len(row.own) for row in layout.Layout((300, 20), (0, 0)).long] == [300]


def test_dropout_is_seen_wherever_it_is():
    model = build(PACKING["llama"])
    assert not has_dropout(model)
    handle = lorakit.attach(model, LoRAConfig(r=2, dropout=0.1))
    assert has_dropout(model)
    handle.detach()
    assert not has_dropout(model)
    assert has_dropout(build(lambda: GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=97))))
    model.config.attention_dropout = 0.1
    assert has_dropout(model)
    assert has_dropout(build(lambda: MixtralForCausalLM(MixtralConfig(**SMALL, router_jitter_noise=0.1))))


@pytest.mark.parametrize("make", ROW_BY_ROW.values(), ids=ROW_BY_ROW)
def test_models_whose_rows_would_touch_are_found_and_run_alone(make):
    model = build(make)
    with packed_attention(model, 400) as packs:
        assert not packs
        got = packed_logits(model, batch((5, 9), every=1))
    rows = batch((5, 9), every=1)
    expected = torch.cat([model(input_ids=rows.ids[None, s]).logits[0] for s in (slice(0, 5), slice(5, 14))])
    torch.testing.assert_close(got, expected[rows.predict], rtol=1e-4, atol=1e-5)


LONG_ROWS_ALONE = {
    "llama4: attention in chunks": (Llama4ForCausalLM, Llama4TextConfig, {"attention_chunk_size": 16}, 16),
    "qwen2-moe: a window its attention is not told": (
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig,
        {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 0},
        20,
    ),
    "llama: rotary frequencies that follow the longest row": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "max_position_embeddings": 64,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        },
        64,
    ),
}


@pytest.mark.parametrize(("kind", "config", "settings", "limit"), LONG_ROWS_ALONE.values(), ids=LONG_ROWS_ALONE)
def test_rows_too_long_for_our_attention_run_alone(kind, config, settings, limit):
    model = build(lambda: kind(config(**SMALL, **settings)))
    with packed_attention(model, limit + 1) as packs:
        assert not packs
        assert model.config._attn_implementation != attention.ATTENTION_NAME
    rows = batch((limit, 5, limit), every=1)
    alone = packed_logits(model, rows)
    with packed_attention(model, limit) as packs:
        assert packs
        packed = packed_logits(model, rows)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant):
    model = build(PACKING["llama"])
    with packed_attention(model, 400):
        logits, gradient = logits_and_gradient(model, batch())
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        model.enable_input_require_grads()
        checkpointed, checkpointed_gradient = logits_and_gradient(model, batch())
    torch.testing.assert_close(checkpointed, logits)
    torch.testing.assert_close(checkpointed_gradient, gradient)


def test_a_window_that_hides_nothing_costs_no_second_grouping():
    packed = layout.Layout((10, 12), (0, 0))
    full = packed.short(torch.device("cpu"), None, 2, 1)
    assert packed.short(torch.device("cpu"), 12, 2, 1) is full
    assert packed.short(torch.device("cpu"), 11, 2, 1) is not full


def test_a_row_cannot_see_its_neighbours():
    model = build(PACKING["llama"])
    rows = batch((20, 24, 22), every=1)
    changed = Batch(
        rows.ids.clone(),
        *(getattr(rows, n) for n in ("positions", "lengths", "forks", "predict", "source", "targets", "rows")),
    )
    changed.ids[:20] = 5
    changed.ids[44:] = 6
    with packed_attention(model, 400):
        before, after = packed_logits(model, rows), packed_logits(model, changed)
    inside = (rows.predict >= 20) & (rows.predict < 44)
    assert torch.equal(before[inside], after[inside])
    assert not torch.equal(before[~inside], after[~inside])


def test_the_models_own_attention_is_back_whatever_is_raised():
    model = build(PACKING["llama"])
    own = model.config._attn_implementation
    with pytest.raises(ZeroDivisionError), packed_attention(model, 400):
        raise ZeroDivisionError
    assert model.config._attn_implementation == own


def test_only_labelled_positions_reach_the_output_head():
    model = build(PACKING["llama"])
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[:2]))
    with packed_attention(model, 400):
        seen.clear()
        assert packed_logits(model, batch((8, 8), every=5)).shape == (3, 97)
    assert seen == [(1, 3)]
