"""Quantised weights kept dense for a block: the same objects afterwards, the same numbers meanwhile, within a limit."""

import pytest
import torch
from torch import nn

import lorakit
from lorakit import LoRAConfig, generation, machine
from lorakit.core.unpacked import unpacked
from lorakit.errors import ConfigError
from lorakit.generation import decoding, generate, stream
from lorakit.quant.nf4 import NF4
from lorakit.quant.tensor import QuantizedTensor, format_of, quantised
from tiny_models import byte_tokenizer, tiny_llama


@pytest.fixture
def model():
    """A Llama with tied embeddings, every matrix in NF4."""
    model = tiny_llama(vocabulary=len(byte_tokenizer()), hidden_size=64, initializer_range=0.1)
    done = {}
    for module in model.modules():
        own = module._parameters.get("weight")
        if own is not None and own.ndim == 2:
            if id(own) not in done:
                done[id(own)] = nn.Parameter(quantised(own, NF4(), torch.float32), requires_grad=False)
            module.weight = done[id(own)]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


def stored(model):
    return [name for name, p in model.named_parameters() if isinstance(p, QuantizedTensor)]


@pytest.mark.parametrize("attached", [False, True])
def test_within_the_block_products_are_of_dense_weights_and_afterwards_all_is_as_before(model, attached):
    if attached:
        lorakit.attach(model, LoRAConfig(r=2))
    before = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    ids = torch.arange(6).view(1, 6)
    with torch.no_grad():
        expected = model(ids).logits
        with unpacked(model, 10**9) as taken:
            assert stored(model) == []
            assert model.lm_head.weight is model.model.embed_tokens.weight
            assert taken == sum(p.nbytes for n, p in model.named_parameters() if p.ndim == 2 and "lorakit" not in n)
            assert torch.equal(model(ids).logits, expected)
    assert {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)} == before


def test_no_more_is_unpacked_than_asked_for_and_an_error_changes_nothing(model):
    before, everything = stored(model), len(stored(model))
    with unpacked(model, 0) as taken:
        assert (taken, len(stored(model))) == (0, everything)
    one = model.model.layers[0].self_attn.q_proj.weight.nbytes
    with pytest.raises(RuntimeError, match="inside"):  # noqa: PT012, SIM117
        with unpacked(model, 3 * one) as taken:
            assert 0 < taken <= 3 * one
            assert 0 < len(stored(model)) < everything
            raise RuntimeError("inside")
    assert stored(model) == before


def test_an_embedding_that_is_only_looked_up_stays(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
    with unpacked(model, 10**9):
        assert stored(model) == ["model.embed_tokens.weight"]


@pytest.mark.parametrize("memory", [None, 0, 20_000])
def test_answers_are_the_same_with_any_memory(model, memory, monkeypatch):
    tokenizer, seen = byte_tokenizer(), []
    prompts = [[5, 6, 7], [8, 9]]
    expected = generate(model, tokenizer, prompts, max_new_tokens=6, stop_ids=frozenset(), unpack_memory=0)
    decode = generation._decode

    def watched(own, *args, **kwargs):
        seen.append(len(stored(own)))
        return decode(own, *args, **kwargs)

    monkeypatch.setattr(generation, "_decode", watched)
    assert generate(model, tokenizer, prompts, max_new_tokens=6, stop_ids=frozenset(), unpack_memory=memory) == expected
    one = stream(
        model,
        tokenizer,
        prompts[0],
        on_text=lambda _: None,
        max_new_tokens=6,
        stop_ids=frozenset(),
        unpack_memory=memory,
    )
    assert one == expected[0]
    everything = len(stored(model))
    assert all((n == 0) if memory is None else (n == everything) if memory == 0 else 0 < n < everything for n in seen)
    assert len(seen) == 2


def test_how_much_is_unpacked_unless_asked_for(model, monkeypatch):
    half = sum(p.nbytes for p in model.parameters()) // 2
    monkeypatch.setattr(machine, "available_memory", lambda: 2 * half)
    with decoding(model):
        assert (
            format_of(model.model.layers[0].self_attn.q_proj.weight) is None or format_of(model.lm_head.weight) is None
        )
        assert stored(model)
    monkeypatch.setattr(machine, "available_memory", lambda: None)
    with decoding(model):
        assert format_of(model.lm_head.weight) == "nf4"
    with pytest.raises(ConfigError, match=r"unpack_memory: bytes, at least 0 \(got -1\)"), decoding(model, -1):
        pass
