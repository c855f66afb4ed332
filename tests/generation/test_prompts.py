"""Soft prompts in generation: a row's text is its own, in a batch and on a route; and it is the argmax of passes."""

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

import lorakit
from lorakit import LoRAConfig, PromptConfig
from lorakit.errors import AdapterError, ConfigError
from lorakit.generation import generate, stream
from tiny_models import SMALL, byte_tokenizer, tiny_gpt2, tiny_llama

PROMPTS = [[5], [70, 71, 72, 73, 74, 75, 76, 77, 78, 79], [9, 8, 7], [90] * 6, [31, 41, 59, 26, 53], [90, 80], [5]]
NAMES = ["both", "prefix", None, "lora", "short", "prompt", "prefix"]
TOKENIZER = byte_tokenizer()


def tiny_mistral():
    """Sees only the last 8 tokens, so that prefixes soon go out of sight."""
    torch.manual_seed(0)
    config = MistralConfig(**SMALL, initializer_range=0.3, sliding_window=8)
    return MistralForCausalLM(config).eval()


MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "sliding window": tiny_mistral}


def with_adapters(make):
    model = make()
    both = PromptConfig(soft_prompt="prompt", virtual_tokens=4)
    ad = lorakit.attach(model, LoRAConfig(r=4, init="random"), name="both", prompt=both)
    ad.add("prefix", PromptConfig(soft_prompt="prefix", virtual_tokens=5), seed=1)
    ad.add("lora", LoRAConfig(r=4, init="random"), seed=2)
    ad.add("short", PromptConfig(soft_prompt="prefix", virtual_tokens=2), seed=3)
    ad.add("prompt", PromptConfig(soft_prompt="prompt", virtual_tokens=3), seed=4)
    return model, ad


def answers(model, prompts, **settings):
    return [each.ids for each in generate(model, TOKENIZER, prompts, max_new_tokens=20, **settings)]


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("name", ["both", "prefix", "prompt"])
def test_greedy_is_the_argmax_of_plain_passes(make, name):
    model, ad = with_adapters(make)
    ad.activate(name)
    for prompt, found in zip(PROMPTS[:3], answers(model, PROMPTS[:3], stop_ids=frozenset()), strict=True):
        ids = list(prompt)
        for _ in range(8):
            with torch.no_grad():
                ids.append(int(model(**ad.prompted(torch.tensor([ids]))).logits[0, -1].argmax()))
        assert found[:8] == tuple(ids[len(prompt) :])
        theirs = model.generate(
            **ad.prompted(torch.tensor([prompt])), max_new_tokens=8, do_sample=False, pad_token_id=0
        )
        assert theirs[0, -8:].tolist() == ids[len(prompt) :]


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.3, "top_p": 0.9, "seed": 7}], ids=["greedy", "sampled"])
def test_a_row_on_a_route_is_the_row_alone(make, sampling):
    model, ad = with_adapters(make)
    with ad.route(NAMES):
        routed = answers(model, PROMPTS, **sampling)
        assert answers(model, PROMPTS, batch_size=2, **sampling) == routed
    for name in ad.names:
        ad.activate(name)
        together = answers(model, PROMPTS, **sampling)
        for i, own in enumerate(NAMES):
            if own == name:
                assert together[i] == routed[i]
    ad.activate(None)
    assert answers(model, PROMPTS, **sampling)[2] == routed[2]
    assert len(set(routed)) == len(routed)


def test_a_route_without_prompts_follows_its_rows_too():
    """Batches are made of rows by length, and shrink; each row keeps its own adapter."""
    model = tiny_llama()
    ad = lorakit.attach(model, LoRAConfig(r=4, init="random"), name="a")
    ad.add("b", LoRAConfig(r=4, init="random"), seed=1)
    names = ["a", None, "b", "b", "a", None, "a"]
    with ad.route(names):
        routed = answers(model, PROMPTS)
        assert answers(model, PROMPTS, batch_size=3) == routed
    for name in ("a", "b", None):
        ad.activate(name)
        alone = answers(model, PROMPTS)
        assert all(alone[i] == routed[i] for i, own in enumerate(names) if own == name)
    with ad.route(["a", "b"]), pytest.raises(AdapterError, match="the batch has 7 rows, the route names 2"):
        answers(model, PROMPTS)


def test_streamed_is_generated():
    model, ad = with_adapters(tiny_llama)
    for name in ("both", "prefix"):
        ad.activate(name)
        pieces = []
        (whole,) = generate(model, TOKENIZER, PROMPTS[1:2], max_new_tokens=20)
        streamed = stream(model, TOKENIZER, PROMPTS[1], on_text=pieces.append, max_new_tokens=20)
        assert streamed == whole
        assert "".join(pieces) == whole.text


def test_virtual_tokens_count_in_the_context():
    model, ad = with_adapters(lambda: tiny_llama(context=24))
    ad.activate("prefix")
    with pytest.raises(ConfigError, match="longest: 8 tokens with those of a soft prompt"):
        answers(model, [[5, 6, 7]])
    ad.activate(None)
    answers(model, [[5, 6, 7]])


def test_rows_filled_up_behind_a_prefix_are_refused_where_a_window_would_count_that():
    model, ad = with_adapters(tiny_mistral)
    ad.activate("prefix")
    ids, mask = torch.tensor([[0, 0, 5, 6], [5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    with pytest.raises(AdapterError, match="sliding window of 8 tokens"):
        model(**ad.prompted(ids, mask))
    model(**ad.prompted(ids))
