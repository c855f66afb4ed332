"""A row's text is its own: the same alone and in a batch, greedy and sampled; and it ends where it must."""

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, MistralConfig, MistralForCausalLM

from lorakit import generation
from lorakit.errors import ConfigError
from lorakit.generation import generate, stream
from lorakit.generation.sampling import draw
from tiny_models import byte_tokenizer, tiny_gpt2, tiny_llama

PROMPTS = [[5], [70, 71, 72, 73, 74, 75, 76, 77, 78, 79], [9, 8, 7], [100] * 6, [31, 41, 59, 26, 53], [200, 100], [5]]
TOKENIZER = byte_tokenizer()


def ids_of(completions):
    return [completion.ids for completion in completions]


def tiny_mistral():
    """Sees only the last 6 tokens."""
    torch.manual_seed(0)
    like = tiny_llama().config.to_dict()
    kept = {key: like[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    kept |= {key: like[key] for key in ("num_attention_heads", "num_key_value_heads", "initializer_range")}
    return MistralForCausalLM(MistralConfig(**kept, sliding_window=6, bos_token_id=None, eos_token_id=None)).eval()


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_mistral])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9}, {"temperature": 1.3, "top_p": 0.8, "seed": 7}])
def test_row_in_a_batch_is_the_row_alone(make, sampling, monkeypatch):
    model = make()
    together = generate(model, TOKENIZER, PROMPTS, max_new_tokens=20, **sampling)
    small = generate(model, TOKENIZER, PROMPTS, max_new_tokens=20, batch_size=2, **sampling)
    monkeypatch.setattr(generation, "BATCH_TOKENS", 1)  # less than one row: rows go alone all the same
    alone = generate(model, TOKENIZER, PROMPTS, max_new_tokens=20, **sampling)
    assert ids_of(together) == ids_of(small) == ids_of(alone)
    assert len(set(ids_of(together))) >= 6  # the model is not bland


def test_greedy_is_the_argmax_of_plain_forward_passes():
    model = tiny_llama()
    for prompt, completion in zip(
        PROMPTS, generate(model, TOKENIZER, PROMPTS, max_new_tokens=8, stop_ids=frozenset()), strict=True
    ):
        ids = list(prompt)
        for _ in range(8):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert completion.ids == tuple(ids[len(prompt) :])
        assert not completion.finished
        assert completion.text == TOKENIZER.decode(completion.ids, skip_special_tokens=True)


def test_samples_differ_between_rows_and_seeds_but_not_between_calls():
    model = tiny_llama()
    first, again, other = (
        generate(model, TOKENIZER, [[5]] * 8, max_new_tokens=12, temperature=1.0, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again
    assert len(set(ids_of(first))) == 8
    assert not set(ids_of(first)) & set(ids_of(other))


def test_sampling_follows_the_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -torch.inf]])
    uniform = torch.from_numpy(np.random.default_rng(0).random(40_000))
    for temperature in (1.0, 0.5):
        drawn = draw(logits.expand(40_000, -1), uniform, temperature, top_p=1.0)
        share = torch.bincount(drawn, minlength=5) / 40_000
        assert torch.allclose(share, torch.softmax(logits[0] / temperature, -1), atol=0.01)
        assert share[4] == 0


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.log(torch.tensor([[0.2, 0.5, 0.25, 0.05]]))
    uniform = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]
    for top_p, kept in [
        (0.4, {1}),
        (0.5, {1}),
        (0.6, {1, 2}),
        (0.9, {0, 1, 2}),
        (0.96, {0, 1, 2, 3}),
        (1.0, {0, 1, 2, 3}),
    ]:
        assert set(draw(logits.expand(1000, -1).double(), uniform, 1.0, top_p).tolist()) == kept


def test_the_largest_draw_is_a_possible_token():
    logits = torch.zeros(1, 3)
    logits[0, 2] = -torch.inf
    almost_one = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert draw(logits, almost_one, 1.0, 1.0).item() == 1


def test_stops_at_every_stop_id_and_says_so():
    model = tiny_llama()
    free = generate(model, TOKENIZER, PROMPTS, max_new_tokens=20, stop_ids=frozenset())
    stop = frozenset({free[1].ids[4], free[2].ids[7]})
    stopped = generate(model, TOKENIZER, PROMPTS, max_new_tokens=20, stop_ids=stop)
    for before, after in zip(free, stopped, strict=True):
        ends = [i for i, token in enumerate(before.ids) if token in stop]
        assert after.finished == bool(ends)
        assert after.ids == before.ids[: ends[0] if ends else None]
    assert stopped[1].finished
    assert stopped[2].finished


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_mistral])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9}])
def test_rows_that_have_ended_leave_the_batch(make, sampling, monkeypatch):
    model, sizes = make(), []
    free = generate(model, TOKENIZER, PROMPTS, max_new_tokens=40, stop_ids=frozenset(), **sampling)
    stop = frozenset({free[0].ids[3], free[1].ids[20], free[2].ids[37]})
    model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    for round_tokens in (1, 5, 16, 100):
        monkeypatch.setattr(generation, "ROUND_TOKENS", round_tokens)
        sizes.clear()
        found = generate(model, TOKENIZER, PROMPTS, max_new_tokens=40, stop_ids=stop, **sampling)
        for before, after in zip(free, found, strict=True):
            end = next((i for i, token in enumerate(before.ids) if token in stop), None)
            assert after.ids == before.ids[:end]
        assert [length for _, length in sizes[1:]] == [1] * (len(sizes) - 1)  # keys and values were kept
        assert (sizes[-1][0] < len(PROMPTS)) == (round_tokens < 40)


def test_a_cache_that_cannot_lose_rows_is_computed_anew(monkeypatch):
    model = tiny_llama()
    expected = generate(model, TOKENIZER, PROMPTS, max_new_tokens=20)
    monkeypatch.setattr(generation, "_kept", lambda cache, rows, of: None)
    assert generate(model, TOKENIZER, PROMPTS, max_new_tokens=20) == expected


def test_default_stop_ids_are_those_of_the_template():
    model = tiny_llama(vocabulary=len(TOKENIZER))
    end = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
    with torch.no_grad():  # one direction that all hidden states share makes <|im_end|> the answer to everything
        model.model.norm.weight.zero_()
        bias = torch.zeros(len(TOKENIZER))
        bias[end] = 1.0
        model.lm_head.bias = torch.nn.Parameter(bias)
    (completion,) = generate(model, TOKENIZER, [[5, 6]], max_new_tokens=4)
    assert completion.finished
    assert completion.ids == ()
    assert completion.text == ""


def test_own_generation_settings_of_the_model_do_not_apply_and_are_restored():
    model = tiny_llama()
    plain = generate(model, TOKENIZER, PROMPTS, max_new_tokens=12)
    theirs = GenerationConfig(
        repetition_penalty=50.0, no_repeat_ngram_size=1, do_sample=True, min_new_tokens=3, pad_token_id=3
    )
    model.generation_config = theirs
    model.train()
    assert generate(model, TOKENIZER, PROMPTS, max_new_tokens=12) == plain
    assert model.generation_config is theirs
    assert model.training


def test_stream_writes_what_generate_returns():
    model = tiny_llama()
    for sampling in ({}, {"temperature": 1.0, "seed": 3}):
        pieces = []
        completion = stream(model, TOKENIZER, PROMPTS[0], on_text=pieces.append, max_new_tokens=24, **sampling)
        assert completion == generate(model, TOKENIZER, PROMPTS[:1], max_new_tokens=24, **sampling)[0]
        assert "".join(pieces).strip() == completion.text.strip()


def test_progress_counts_rows():
    seen = []
    generate(
        tiny_llama(), TOKENIZER, PROMPTS, max_new_tokens=2, batch_size=3, on_progress=lambda *args: seen.append(args)
    )
    assert seen == [(3, 7), (6, 7), (7, 7)]


def test_no_prompts_no_completions():
    assert generate(tiny_llama(), TOKENIZER, []) == []


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[1], []], {}, "prompt 1 has no tokens"),
        (
            [[1], [1] * 500],
            {"max_new_tokens": 13},
            "1 of 2 prompts (first: number 1; longest: 500 tokens) and max_new_tokens=13",
        ),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens"),
        ([[1]], {"temperature": -0.1}, "temperature"),
        ([[1]], {"temperature": float("nan")}, "temperature"),
        ([[1]], {"top_p": 0.0}, "top_p"),
        ([[1]], {"top_p": 1.1}, "top_p"),
        ([[1]], {"seed": -1}, "seed"),
        ([[1]], {"batch_size": 0}, "batch_size"),
    ],
)
def test_what_cannot_be_done_is_an_error(prompts, settings, message):
    with pytest.raises(ConfigError) as error:
        generate(tiny_llama(), TOKENIZER, prompts, **settings)
    assert message in str(error.value)


def test_a_prompt_may_fill_the_context_exactly():
    (completion,) = generate(tiny_llama(), TOKENIZER, [[1] * 500], max_new_tokens=12, stop_ids=frozenset())
    assert len(completion.ids) == 12
