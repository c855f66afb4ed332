"""Metrics against other implementations, and subjects measured each through its own adapter, tokenizer and template."""

import math

import pytest
import sacrebleu
import torch
from rouge_score.rouge_scorer import RougeScorer

import lorakit
from lorakit import models
from lorakit.data.chat import ChatFormat
from lorakit.data.sources import read_rows
from lorakit.errors import AdapterFileError, ConfigError, DataError, ModelError
from lorakit.evaluation import METRICS, bleu, evaluate, exact_match, json_valid, rouge_l
from lorakit.generation import generate
from tiny_models import CHATML, byte_tokenizer, tiny_llama
from tiny_subjects import conversation, save_adapter, save_model, write_jsonl

TEXTS = ["The cat sat on the mat .", "A dog barked loudly at the moon", "Nothing at all to see here, folks", "Yes"]
REFERENCES = [
    ["the cat sat on a mat.", "On the mat sat the cat."],
    ["A dog barked at the moon loudly.", "The dog barked at the moon", "A dog barks."],
    ["Nothing to see here, folks!"],
    ["No", "Yes"],
]

# ---------------------------------------------------------------- metrics


def test_bleu_of_rows_with_different_numbers_of_references_is_the_sum_of_their_statistics():
    metric = sacrebleu.BLEU(lowercase=True, tokenize="13a", effective_order=False)
    statistics = [
        metric._extract_corpus_statistics([text], [[r] for r in accepted])[0]
        for text, accepted in zip(TEXTS, REFERENCES, strict=True)
    ]
    expected = metric._aggregate_and_compute(statistics).score
    assert bleu(TEXTS, REFERENCES) == pytest.approx(expected, rel=1e-12)
    assert 0 < expected < 100


def test_bleu_takes_every_reference_and_no_case():
    assert bleu(["THE CAT SAT ON A MAT."], REFERENCES[:1]) == pytest.approx(100)
    assert bleu(["on the mat sat the cat."], REFERENCES[:1]) == pytest.approx(100)


def test_rouge_l_is_rouge_score_on_english():
    scorer = RougeScorer(["rougeL"])
    best = [
        max(scorer.score(r, text)["rougeL"].fmeasure for r in accepted)
        for text, accepted in zip(TEXTS, REFERENCES, strict=True)
    ]
    assert rouge_l(TEXTS, REFERENCES) == pytest.approx(sum(best) / 4, rel=1e-12)


def test_rouge_l_sees_letters_of_other_alphabets():
    assert rouge_l(["привет мир"], [["привет мир"]]) == 1
    assert rouge_l(["привет мир"], [["привет дом"]]) == pytest.approx(0.5)
    assert rouge_l(["año"], [["a o"]]) == 0  # rouge-score alone takes ñ for a space


def test_exact_match_strips_and_accepts_any_reference():
    assert exact_match([" Yes\n", "no", "maybe", ""], [["Yes"], ["yes", "no "], ["No"], [" "]]) == 0.75


def test_exact_match_of_what_follows_the_last_marker():
    predictions = ["2 #### 3\n#### 18", "#### 17", "it is 18", "#### 18 eggs"]
    references = [["some way\n#### 18"]] * 4
    assert exact_match(predictions, references, answer_after="####") == 0.25
    assert exact_match(predictions, references) == 0
    with pytest.raises(DataError, match=r"1 of 2 rows \(first: number 2\) have a reference without '####'"):
        exact_match(["#### 1"] * 2, [["#### 1"], ["1"]], answer_after="####")


@pytest.mark.parametrize("text", ['{"a": [1, null]}', ' "x"\n', "7"])
def test_json_valid(text):
    assert json_valid([text], [["whatever"]]) == 1


@pytest.mark.parametrize(
    "text", ["", '{"a": 1', 'Sure: {"a": 1}', "NaN", '{"a": 1, "a": 2}', '{"a": 1} {"b": 2}', "```json\n1\n```"]
)
def test_json_valid_is_strict(text):
    assert json_valid([text], [["whatever"]]) == 0


# ---------------------------------------------------------------- subjects


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, base):
    return save_adapter(tmp_path_factory.mktemp("adapter"), base)


@pytest.fixture
def data(tmp_path):
    rows = [conversation(i, answer="blue " * (i % 3) + "red") for i in range(7)]
    return write_jsonl(tmp_path / "rows.jsonl", rows)


def loss_by_hand(model, tokenizer, data):
    """Row by row with transformers alone: the answer and its end token, after a prompt as a server sends it."""
    total = tokens = 0
    for row in read_rows(data):
        user, answer = row.fields["messages"]
        prompt = f"<|im_start|>user\n{user['content']}<|im_end|>\n<|im_start|>assistant\n"
        prompt_ids = tokenizer.encode(prompt)
        ids = prompt_ids + tokenizer.encode(answer["content"] + "<|im_end|>")
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        start = len(prompt_ids)
        log_p = torch.log_softmax(logits[start - 1 : -1].double(), -1)
        total -= log_p.gather(1, torch.tensor(ids[start:])[:, None]).sum().item()
        tokens += len(ids) - start
    return total / tokens, tokens


def test_loss_is_that_of_plain_forward_passes_for_base_and_adapter(base, adapter, data):
    plain, tuned = evaluate(model=base, data=data, adapters=[adapter], base=True, dtype="fp32", device="cpu")
    model, tokenizer = models.load_model(base, dtype="fp32", device="cpu")
    expected, tokens = loss_by_hand(model, tokenizer, data)
    assert plain.scores["loss"] == pytest.approx(expected, rel=1e-5)
    assert (plain.adapter, plain.rows, plain.tokens, plain.cut) == (None, 7, tokens, 0)
    lorakit.attach(model, adapter)
    assert tuned.scores["loss"] == pytest.approx(loss_by_hand(model, tokenizer, data)[0], rel=1e-5)
    assert tuned.scores["loss"] != pytest.approx(expected, rel=1e-2)
    assert tuned.adapter == adapter


def test_the_base_is_the_base_whatever_is_active(base, adapter, data):
    loaded = models.load_model(base, dtype="fp32", device="cpu")
    (plain,) = evaluate(model=loaded, data=data)
    handle = lorakit.attach(loaded[0], adapter)
    (still_plain,) = evaluate(model=loaded, data=data)
    assert still_plain.scores["loss"] == pytest.approx(plain.scores["loss"], rel=1e-6)
    assert handle.active == {"default": 1.0}


def test_subjects_are_the_base_without_adapters_and_the_adapters_with_them(base, adapter, data):
    def subjects(**settings):
        return [r.adapter for r in evaluate(data=data, dtype="fp32", device="cpu", limit=1, **settings)]

    assert subjects(model=base) == [None]
    assert subjects(adapters=[adapter]) == [adapter]  # the base is the one that the adapter names
    assert subjects(adapters=[adapter], base=True) == [None, adapter]
    in_memory = lorakit.Adapter.load(adapter)
    assert subjects(model=base, adapters=[in_memory, adapter]) == ["adapter 1", adapter]


def test_answers_are_those_of_each_subject(base, adapter, tmp_path):
    model, tokenizer = models.load_model(base, dtype="fp32", device="cpu")
    questions = [conversation(i) for i in range(5)]
    chat_format = ChatFormat(tokenizer, models.stop_ids(model, tokenizer), 512)
    prompts = [chat_format.prompt_ids(q["messages"][:1]) for q in questions]
    plain = [c.text for c in generate(model, tokenizer, prompts, max_new_tokens=8)]
    handle = lorakit.attach(model, adapter)
    tuned = [c.text for c in generate(model, tokenizer, prompts, max_new_tokens=8)]
    assert not set(plain) & set(tuned)
    handle.detach()

    rows = [q | {"references": ["something else", text]} for q, text in zip(questions, tuned, strict=True)]
    data = write_jsonl(tmp_path / "tuned.jsonl", rows)
    results = evaluate(
        model=(model, tokenizer), data=data, adapters=[adapter], base=True, metrics=["exact_match"], max_new_tokens=8
    )
    assert [r.scores["exact_match"] for r in results] == [0, 1]
    assert [p.text for p in results[0].predictions] == plain
    assert [p.text for p in results[1].predictions] == tuned
    assert results[1].predictions[2].row == f"{data}:3"
    assert results[1].predictions[2].references == ("something else", tuned[2])
    with pytest.raises(lorakit.LorakitError):
        lorakit.adapters(model)  # nothing stays attached to a model that was handed in


def test_all_metrics_in_their_order(base, data):
    (result,) = evaluate(
        model=base,
        data=data,
        metrics=["rouge", "json_valid", "bleu", "exact_match", "loss"],
        max_new_tokens=6,
        limit=3,
        dtype="fp32",
        device="cpu",
    )
    told = result.to_dict()
    assert list(told)[:8] == ["adapter", "rows", "loss", "exact_match", "bleu", "rouge_l", "json_valid", "tokens"]
    assert told["rows"] == 3
    assert 0 <= told["finished"] <= 1
    assert told["seconds"] > 0
    assert all(math.isfinite(told[metric]) for metric in METRICS)


def test_an_adapter_is_measured_with_the_template_it_was_trained_with(base, tmp_path, data):
    template = "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + '<|endoftext|>' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
    own = save_adapter(tmp_path / "own", base, tokenizer=byte_tokenizer(chat_template=template))
    plain = save_adapter(tmp_path / "plain", base)
    results = evaluate(model=base, data=data, adapters=[own, plain], dtype="fp32", device="cpu")
    assert results[0].scores["loss"] != pytest.approx(results[1].scores["loss"], rel=1e-3)
    (tmp_path / "chatml.jinja").write_text(CHATML)
    forced = evaluate(
        model=base,
        data=data,
        adapters=[own, plain],
        chat_template=str(tmp_path / "chatml.jinja"),
        dtype="fp32",
        device="cpu",
    )
    assert forced[0].scores["loss"] == pytest.approx(forced[1].scores["loss"], rel=1e-6)
    assert forced[0].scores["loss"] == pytest.approx(results[1].scores["loss"], rel=1e-6)


def test_cut_rows_are_counted(base, data):
    (result,) = evaluate(model=base, data=data, max_length=20, dtype="fp32", device="cpu")
    assert result.cut == 7


def test_progress_names_the_subject(base, adapter, data):
    seen = []
    evaluate(
        model=base, data=data, adapters=[adapter], base=True, metrics=["json_valid"], max_new_tokens=2, batch_size=4,
        on_progress=lambda *args: seen.append(args), dtype="fp32", device="cpu",
    )  # fmt: skip
    assert seen == [("base", 4, 7), ("base", 7, 7), (adapter, 4, 7), (adapter, 7, 7)]


def test_text_rows_have_a_loss_and_no_answers(base, tmp_path):
    data = write_jsonl(tmp_path / "text.jsonl", [{"text": "once upon a time"}, {"text": "there was"}])
    (result,) = evaluate(model=base, data=data, dtype="fp32", device="cpu")
    assert result.tokens == len("once upon a time") + len("there was")
    with pytest.raises(DataError, match=r"2 of 2 rows cannot be evaluated(.|\n)*text\.jsonl:1"):
        evaluate(model=base, data=data, metrics=["bleu"], dtype="fp32", device="cpu")


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"metrics": ["blue"]}, ConfigError, "did you mean bleu"),
        ({"metrics": []}, ConfigError, "metrics: expected a list"),
        ({"metrics": "loss"}, ConfigError, "metrics: expected a list"),
        ({"limit": 0}, ConfigError, "limit"),
        ({"answer_after": "####"}, ConfigError, "needs the metric exact_match"),
        ({"model": None}, ModelError, "no model: name one"),
        ({"data": "no-such.jsonl"}, DataError, "no-such.jsonl"),
        ({"data": []}, DataError, "no rows"),
        ({"adapters": ["no/adapter"]}, AdapterFileError, "no/adapter"),
        ({"adapters": ["a", "a"]}, ConfigError, "a given twice"),
    ],
)
def test_what_cannot_be_measured_is_an_error_before_the_model_is_loaded(
    settings, kind, message, base, data, monkeypatch
):
    monkeypatch.setattr(models, "_from_pretrained", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    with pytest.raises(kind) as error:
        evaluate(**{"model": base, "data": data, **settings})
    assert message in str(error.value)


def test_adapters_of_different_bases_need_a_model(base, adapter, tmp_path, data):
    other = save_adapter(tmp_path / "adapter", save_model(tmp_path / "other", seed=1))
    with pytest.raises(ModelError, match="the adapters name different base models"):
        evaluate(adapters=[adapter, other], data=data)


def test_a_model_is_handed_back_as_it_was_even_if_measuring_fails(adapter, data):
    model, tokenizer = tiny_llama(vocabulary=len(byte_tokenizer())), byte_tokenizer()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    subject = {"model": (model, tokenizer), "data": data, "adapters": [adapter], "metrics": ["bleu"]}
    with pytest.raises(ConfigError, match="context of 512 tokens"):
        evaluate(**subject, max_new_tokens=510)
    evaluate(**subject, max_new_tokens=2)
    assert {type(module) for module in model.modules()} == {type(module) for module in tiny_llama().modules()}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
