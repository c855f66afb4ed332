"""A head is left out of a pass only where logits are its product and nothing else; every other model is seen."""

import pytest
import torch
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

import lorakit
from lorakit import LoRAConfig
from lorakit.data.batches import collate
from lorakit.fusion import fused
from lorakit.packing import packed_attention, packed_hidden, packed_logits, separable_head
from tiny_models import DECODER_SIZES, SMALL, tiny_llama

SEPARABLE = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "gemma2 without its cap": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=None)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SMALL)),
    "gpt2: tied": lambda: GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=97, n_positions=512)),
    "phi: a head with bias": lambda: PhiForCausalLM(PhiConfig(**DECODER_SIZES)),
    "mamba: rows one by one": lambda: MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=97)),
}
OTHER = {
    "gemma2: capped": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL)),
    "cohere: scaled": lambda: CohereForCausalLM(CohereConfig(**SMALL)),
    "granite: divided": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=4.0)),
}


class Row:
    def __init__(self, ids, first_target):
        self.ids, self.trained = ids, [i >= first_target for i in range(len(ids))]


def rows():
    """Rows of which some begin alike, up to a token that predicts for several."""
    generator = torch.Generator().manual_seed(0)

    def some(n):
        return torch.randint(3, 97, (n,), generator=generator).tolist()

    begin = some(12)
    return [Row(begin + some(n), 9) for n in (4, 9, 30)] + [Row(some(20), 3)]


def build(make):
    torch.manual_seed(0)
    return make().requires_grad_(False).eval()


@pytest.mark.parametrize("make", SEPARABLE.values(), ids=SEPARABLE)
def test_what_enters_the_head_makes_the_logits(make):
    model = build(make)
    own = dict(vars(model.get_output_embeddings()))
    with fused(model), packed_attention(model, 50) as packs:
        batch = collate(rows(), range(4), share=packs)
        assert (batch.source is not None) == packs
        head = separable_head(model)
        assert head is model.get_output_embeddings()
        hidden = packed_hidden(model, batch, head)
        logits = head(hidden)
        assert hidden.shape[0] == len(batch.predict)
        expected = packed_logits(model, batch)
        torch.testing.assert_close(logits if batch.source is None else logits[batch.source], expected)
    assert vars(head) == own


@pytest.mark.parametrize("make", OTHER.values(), ids=OTHER)
def test_models_that_change_their_logits_are_seen(make):
    model = build(make)
    with fused(model), packed_attention(model, 50):
        assert separable_head(model) is None
    assert "forward" not in vars(model.get_output_embeddings())


class Masking(LlamaForCausalLM):
    """Changes its logits in their place."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits[..., 5:] = -100.0
        return output


class Twice(LlamaForCausalLM):
    """Uses its head twice."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        self.lm_head(output.logits.new_zeros(1, self.config.hidden_size))
        return output


class Beside(LlamaForCausalLM):
    """Multiplies by the head's weight without calling the head."""

    def forward(self, input_ids, logits_to_keep=0, **kwargs):
        output = super().forward(input_ids, **kwargs)
        hidden = self.model(input_ids).last_hidden_state[:, logits_to_keep]
        output.logits = nn.functional.linear(hidden, self.lm_head.weight)
        return output


@pytest.mark.parametrize("kind", [Masking, Twice, Beside])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_what_no_operation_of_its_own_shows_is_seen_too(kind, mode):
    model = build(lambda: kind(LlamaConfig(**SMALL)))
    with mode():
        assert separable_head(model) is None


def test_a_model_changed_after_it_was_probed_is_not_believed():
    model = build(SEPARABLE["gemma2 without its cap"])
    with packed_attention(model, 50) as packs:
        batch = collate(rows(), range(4), share=packs)
        head = separable_head(model)
        model.config.final_logit_softcapping = 30.0
        with pytest.raises(RuntimeError, match="does more to its logits than when it was probed"):
            packed_hidden(model, batch, head)
    assert "forward" not in vars(head)


def test_only_a_frozen_head_that_nothing_wraps():
    model = build(SEPARABLE["llama"])
    head = separable_head(model)
    assert head is model.lm_head
    head.requires_grad_()
    assert separable_head(model) is None
    with torch.no_grad():
        assert separable_head(model) is head
    head.requires_grad_(False)
    hook = head.register_forward_hook(lambda module, args, output: None)
    assert separable_head(model) is None
    hook.remove()
    head.forward = lambda x: x
    assert separable_head(model) is None
    del head.forward
    assert separable_head(model) is head
    model.lm_head = nn.Sequential(nn.Linear(32, 97))
    assert separable_head(model) is None
    assert separable_head(nn.Linear(2, 2)) is None


ADAPTED_HEADS = {
    "low rank": LoRAConfig(r=2, target_modules=["lm_head"]),
    "trained whole": LoRAConfig(r=2, modules_to_save=("lm_head",)),
    "its weight by name": LoRAConfig(r=2, target_modules=["q_proj"], target_parameters=["lm_head.weight"]),
    "tied to rows that are trained": LoRAConfig(r=2, target_modules=["q_proj"], trainable_tokens=(7, 3)),
}


@pytest.mark.parametrize("config", ADAPTED_HEADS.values(), ids=ADAPTED_HEADS)
def test_an_adapted_head_runs_and_a_detached_one_is_left_out_again(config):
    model = tiny_llama().requires_grad_(False)  # its head is tied to its embedding
    handle = lorakit.attach(model, config)
    assert separable_head(model) is None
    handle.detach()
    assert separable_head(model) is model.lm_head


def test_a_compiled_model_runs_whole():
    model = build(SEPARABLE["llama"])
    compiled = torch.compile(model, backend="eager")
    assert separable_head(compiled) is None
    assert separable_head(model) is model.lm_head
    model.compile(backend="eager")
    assert separable_head(model) is None
