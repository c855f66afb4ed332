import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat_styles import NO_END, STYLES, chat, make_tokenizer, messages, row
from lorakit.data.prepare import MOST_HELD_OUT, Data, inspect_data, overlap, prepare, read_data, split
from lorakit.data.sources import Origin, Row, read_rows
from lorakit.errors import DataError
from lorakit.files import write_text


def rows(count, prompt="What {}?", answer="Blue {}."):
    return [row(i + 1, messages=messages(prompt.format(i), answer.format(i))) for i in range(count)]


# ---------------------------------------------------------------- the gate


def test_statistics_count_rows_tokens_and_ends():
    tokenizer = STYLES["gemma"]()
    data = [*rows(3), row(4, messages=messages("What 0?", "Blue 0.")), row(5, messages=messages("a", "b", "c"))]
    dataset = prepare(data, chat(tokenizer))
    found = dataset.statistics
    assert (found.rows, found.examples, found.schemas) == (5, 5, {"messages": 5})
    assert found.tokens == sum(len(example.ids) for example in dataset.examples)
    assert found.trained_tokens == sum(map(sum, (example.trained for example in dataset.examples)))
    assert found.trained_share == found.trained_tokens / found.tokens
    assert (found.duplicates, found.dropped_turns, found.end_trained, found.serving_prompts) == (1, 1, 5, 5)
    assert (found.prompts_cut, found.answers_cut, found.eos_appended) == (0, 0, 0)
    assert found.length_min <= found.length_median <= found.length_p95 <= found.length_max == found.length_uncut_max
    assert found.template == "the tokenizer's own"
    assert found.to_dict() == dataclasses.asdict(found)


def test_cut_rows_are_counted():
    tokenizer = STYLES["mistral"]()
    long_prompt = row(1, messages=messages("What is the answer? " * 60, "Blue."))
    long_answer = row(2, messages=messages("What?", "four " * 160))
    found = prepare([long_prompt, long_answer, *rows(1)], chat(tokenizer, max_length=128)).statistics
    assert (found.prompts_cut, found.answers_cut) == (1, 1)
    assert (found.end_trained, found.serving_prompts) == (2, 2)
    assert found.length_max == 128
    assert found.length_uncut_max > 200


def test_no_serving_prompt_where_there_is_no_prompt():
    found = prepare([row(1, text="Name a colour.")], chat(make_tokenizer())).statistics
    assert found.serving_prompts is None
    assert found.eos_appended == 1


def test_bad_rows_are_told_together_with_their_lines():
    bad = [row(2, messages=messages("a", "")), row(3, message=1), row(5, messages=messages("a"))]
    with pytest.raises(DataError) as caught:
        prepare([*rows(1), *bad], chat(STYLES["chatml"]()))
    message = str(caught.value)
    assert "3 row(s) cannot be trained on" in message
    for line in (2, 3, 5):
        assert f"data.jsonl:{line}: " in message


def test_twenty_bad_rows_are_listed():
    with pytest.raises(DataError) as caught:
        prepare([row(i, messages=messages("a", "")) for i in range(30)], chat(STYLES["chatml"]()))
    assert str(caught.value).count("data.jsonl:") == 20
    assert "... and 10 more" in str(caught.value)


def test_an_empty_answer_never_reaches_the_loss():
    """trl#6548: the mean over no token is NaN."""
    for empty in ({"prompt": "a", "completion": ""}, {"instruction": "a", "output": " "}):
        with pytest.raises(DataError, match="empty"):
            prepare([row(**empty)], chat(STYLES["chatml"]()))


def test_where_most_answers_lose_their_end_training_is_refused():
    long = [row(i, messages=messages("What?", "four " * 60)) for i in range(3)]
    with pytest.raises(DataError, match=r"the answers of 3 of 5 rows .* raise it \(the longest row has \d+ tokens\)"):
        prepare([*long, *rows(2)], chat(STYLES["mistral"](), max_length=32))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"trained": [False] * 5}, "no token is trained"),
        ({"trained": [True] * 5}, "the first token is trained"),
        ({"trained": [False, True, True, True, False]}, "the end token is not trained"),
        ({"ids": [20] * 5, "trained": [False, True, True, True, True]}, "the end token is not trained"),
    ],
)
def test_the_gate_looks_at_the_tokens_whoever_made_them(monkeypatch, change, reason):
    chat_format = chat(STYLES["chatml"]())
    (good,) = chat_format.encode(row(messages=messages("a", "b")))
    end = next(iter(chat_format.stop_ids))
    wrong = dataclasses.replace(good, ids=[20, 21, 22, 23, end])
    wrong = dataclasses.replace(wrong, **change)
    monkeypatch.setattr(chat_format, "examples", lambda *_: [wrong])
    with pytest.raises(
        DataError, match=rf"1 row\(s\) would train nothing or the wrong thing:\n  - data.jsonl:1: {reason}"
    ):
        prepare([row(messages=messages("a", "b"))], chat_format)


def test_no_rows():
    with pytest.raises(DataError, match="no rows"):
        prepare([], chat(make_tokenizer()))


# ---------------------------------------------------------------- holding out


@settings(max_examples=30, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(0, 3), st.floats(0, 0.9))
def test_the_same_rows_are_held_out_whatever_the_order(shuffler, seed, share):
    data = rows(40)
    train, valid = split(data, share, seed)
    shuffled = data.copy()
    shuffler.shuffle(shuffled)
    again_train, again_valid = split(shuffled, share, seed)
    assert {each.origin for each in valid} == {each.origin for each in again_valid}
    assert len(train) + len(valid) == len(again_train) + len(again_valid) == 40
    assert len(valid) == max(1, round(share * 40))
    assert [each for each in data if each in train] == train


def test_another_seed_holds_out_other_rows():
    assert split(rows(40), 0.2, 0)[1] != split(rows(40), 0.2, 1)[1]


def test_rows_with_one_prompt_stay_together():
    data = [row(i, messages=messages(f"What {i // 3}?", f"Blue {i}.")) for i in range(60)]
    train, valid = split(data, 0.2, 0)
    assert len(valid) == 12
    found = overlap(train, valid)
    assert (found.rows, found.prompts) == (0, 0)


def test_where_all_rows_share_a_prompt_only_equal_rows_stay_together():
    data = [row(i, messages=messages("What?", f"Blue {i // 2}.")) for i in range(20)]
    train, valid = split(data, 0.2, 0)
    assert len(valid) == 4
    assert overlap(train, valid).rows == 0
    assert overlap(train, valid).prompts == 4


def test_held_out_rows_are_at_most_a_few_hundred_and_at_least_one():
    data = [row(i, prompt=str(i), completion="a") for i in range(MOST_HELD_OUT * 4)]
    assert len(split(data, 0.5, 0)[1]) == MOST_HELD_OUT
    assert len(split(data[:3], 0.01, 0)[1]) == 1
    assert len(split(data[:2], 0.9, 0)[1]) == 1


def test_of_rows_that_are_all_the_same_none_is_held_out():
    for same in ([row(messages=messages("a", "b"))] * 3, rows(1)):
        assert split(same, 0.1, 0) == (same, [])


def test_bad_rows_are_told_before_the_split():
    with pytest.raises(DataError, match=r"2 row\(s\) cannot be trained on"):
        split([*rows(3), row(4, message=1), row(5, message=1)], 0.1, 0)


def test_a_lone_document_is_cut_at_a_line_break_near_its_end():
    text = "".join(f"line {i}\n" for i in range(100))
    ((train,), (valid,)) = split([Row(Origin("a.txt", 1), {"text": text})], 0.1, 0)
    assert train.fields["text"] + valid.fields["text"] == text
    assert valid.fields["text"].startswith(f"line {valid.origin.line - 1}\n")
    assert 0.05 * len(text) < len(valid.fields["text"]) < 0.11 * len(text)


@pytest.mark.parametrize(
    ("train", "valid", "share"),
    [
        ("a\nand a long line\n", "the last line", 0.1),  # no line break behind the cut
        ("a long first line and\n", "b\nc\nd", 0.2),  # nearer before the cut than behind it
        ("one line of ", "words", 0.3),  # no line break
        ("\n\none line of ", "words\n\n", 0.3),  # none that parts words
        ("Title\nand a very long line of many words in ", "one", 0.05),  # none that leaves training the larger part
        ("a\n", "bcdefghi", 0.1),  # no other place
        ("a ", "b", 0.0),
        ("a\n", "b\nc\nd\ne\nf", 0.9),
    ],
)
def test_a_lone_document_is_parted_at_the_nearest_line_break_or_space(train, valid, share):
    ((one,), (other,)) = split([Row(Origin("a.txt", 1), {"text": train + valid})], share, 0)
    assert (one.fields["text"], other.fields["text"]) == (train, valid)
    assert (one.origin, other.origin) == (Origin("a.txt", 1), Origin("a.txt", 1 + train.count("\n")))


@settings(max_examples=100, deadline=None)
@given(st.text("ab \n", min_size=1).filter(str.strip), st.floats(0, 0.99))
def test_a_document_of_two_words_can_always_be_parted(text, share):
    train, valid = split([Row(Origin("a.txt", 1), {"text": text})], share, 0)
    assert "".join(each.fields["text"] for each in (*train, *valid)) == text
    assert all(each.fields["text"].strip() for each in (*train, *valid))
    assert len(valid) == (len(text.split()) > 1)


def test_overlap_compares_what_rows_say():
    train = [row(1, messages=messages("a", "b")), row(2, instruction="c", output="d")]
    valid = [
        row(1, conversations=[{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], references=["b"]),
        row(2, messages=messages("c", "other")),
        row(3, messages=messages("e", "f")),
    ]
    found = overlap(train, valid)
    assert (found.rows, found.prompts) == (1, 2)


# ---------------------------------------------------------------- for people


def write(tmp_path, name, count, **options):
    lines = [f'{{"prompt": "What {i}?", "completion": "Blue {i}."}}\n' for i in range(count)]
    write_text(tmp_path / name, "".join(lines))
    return tmp_path / name


def test_read_data_with_and_without_a_validation_file(tmp_path):
    train, valid = write(tmp_path, "a.jsonl", 20), write(tmp_path, "b.jsonl", 3)
    chat_format = chat(STYLES["gemma"]())
    held_out = read_data(train, None, 0.1, 0, chat_format)
    assert (len(held_out.train.rows), len(held_out.valid.rows), held_out.held_out) == (18, 2, True)
    assert held_out.lines()[0] == "data   20 rows, prompt: 18 train, 2 valid held out; 0 cut"
    assert "end token in 20 of 20; prompt = serving prompt; template: the tokenizer's own" in held_out.lines()[1]
    assert len(held_out.lines()) == 3

    given_file = read_data(train, valid, 0.1, 0, chat_format)
    assert (len(given_file.train.rows), len(given_file.valid.rows), given_file.held_out) == (20, 3, False)
    assert "of 3 validation rows, 3 are training rows too" in given_file.lines()[-1]
    assert given_file.statistics()["overlap"] == {"rows": 3, "prompts": 3, "held_out": False}
    assert given_file.statistics()["training"] == given_file.train.statistics.to_dict()


@pytest.mark.parametrize(
    ("fields", "count", "which"),
    [
        ({"prompt": "What?", "completion": "Blue."}, 1, "one row"),
        ({"prompt": "What?", "completion": "Blue."}, 3, "3 rows that all say the same"),
        ({"text": "Blue"}, 1, "one text without a line break or a space between words"),
    ],
)
def test_where_nothing_can_be_held_out_rows_are_inspected_but_not_trained_on(tmp_path, fields, count, which):
    file = tmp_path / "a.jsonl"
    write_text(file, (json.dumps(fields) + "\n") * count)
    chat_format = chat(STYLES["gemma"]())
    found = inspect_data(file, None, 0.05, 0, chat_format)
    assert len(found.train.rows) == found.statistics()["training"]["rows"] == count
    assert (found.statistics()["validation"], found.statistics()["overlap"]) == (None, None)
    assert found.lines()[0].startswith(f"data   {count} rows, ")
    reason = f"no validation rows can be held out of {which}"
    assert found.lines()[-1] == f"note   train will need --validation FILE: {reason}"
    with pytest.raises(DataError) as caught:
        read_data(file, None, 0.05, 0, chat_format)
    assert str(caught.value) == f"{file}: {reason}; give validation rows with --validation FILE"
    assert isinstance(inspect_data(file, file, 0.05, 0, chat_format), Data)
    assert len(read_data(file, file, 0.05, 0, chat_format).valid.rows) == count


def test_the_validation_split_of_a_data_set(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    for name, count in (("train", 6), ("test", 3), ("validation", 2)):
        write(folder, f"{name}.jsonl", count)
    chat_format = chat(STYLES["gemma"]())
    sizes = {
        validation: len(read_data(folder, validation, 0.05, 0, chat_format).valid.rows)
        for validation in (folder, f"{folder}:test", f"{folder}:train", None)
    }
    assert list(sizes.values()) == [2, 3, 6, 1]


def test_rows_with_tools_choose_the_template_of_training_and_validation(tmp_path):
    def tool_row(number):
        call = {"role": "assistant", "content": "", "tool_calls": [{"name": "get_weather", "arguments": {"n": number}}]}
        return {"messages": [*messages(f"What {number}?"), call], "tools": [{"name": "get_weather"}]}

    plain, tools = write(tmp_path, "a.jsonl", 5), tmp_path / "b.jsonl"
    write_text(tools, "".join(json.dumps(tool_row(number)) + "\n" for number in range(3)))
    chat_format = chat(STYLES["chatml"]())
    for train, valid in ((tools, None), (tools, plain), (plain, tools)):
        data = read_data(train, valid, 0.05, 0, chat_format)
        assert data.chat_format.template == chat(STYLES["chatml"](), chat_template="chatml-tools").template
        assert "template: chatml-tools, since the tokenizer's own shows no tools" in data.lines()[1]
        again = read_data(train, valid, 0.05, 0, chat(data.chat_format.tokenizer))  # with what is saved of it
        assert (again.train.examples, again.valid.examples) == (data.train.examples, data.valid.examples)
    assert read_data(plain, None, 0.05, 0, chat_format).chat_format is chat_format
    with pytest.raises(DataError, match=r"does not show the tool .* --chat-template chatml-tools"):
        read_data(tools, None, 0.05, 0, chat(STYLES["llama3"]()))


def test_what_needs_telling_is_told():
    data = [*rows(4), *rows(1), row(7, messages=messages("a", "b", "c"))]
    lines = "\n".join(_lines(data, make_tokenizer(NO_END)))
    assert "1 training rows repeat an earlier one" in lines
    assert "1 turns after the last answer of their row are left out" in lines
    assert "the template ends no answer, so the end token was added to 6 rows" in lines
    long = row(9, messages=messages("What is the answer? " * 20, "Blue."))
    assert "1 prompts cut to fit 32 tokens" in _lines([*rows(4), long], STYLES["mistral"](), max_length=32)[0]


def _lines(data, tokenizer, **options):
    from lorakit.data.prepare import summary

    return summary(prepare(data, chat(tokenizer, **options)).statistics)


# ---------------------------------------------------------------- real model, real data


@pytest.mark.real_model
def test_smollm2_on_real_rows(smollm2, shared_data):
    from lorakit.models import load_tokenizer

    tokenizer = load_tokenizer(smollm2)
    data = read_rows(shared_data / "e2e_nlg" / "valid.jsonl")
    dataset = prepare(data, chat(tokenizer))
    assert dataset.statistics.end_trained == dataset.statistics.serving_prompts == 40
    for each, example in zip(data, dataset.examples, strict=True):
        turns = each.fields["messages"]
        ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
        prompt = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, tokenize=True, return_dict=False)
        assert example.ids == ids[:-1]  # without the line break after the end token
        assert example.trained == [False] * len(prompt) + [True] * (len(ids) - 1 - len(prompt))
        assert example.ids[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id


@pytest.mark.real_model
def test_smollm2_on_tool_rows(smollm2, shared_data):
    from lorakit.models import load_tokenizer

    tokenizer = load_tokenizer(smollm2)
    data = read_rows(shared_data / "glaive_toolcall" / "valid.jsonl")
    with pytest.raises(DataError, match=r"use a template that does, e\.g\. --chat-template chatml-tools"):
        prepare(data, chat(tokenizer))
    chat_format = chat(tokenizer, max_length=4096).for_rows(data)
    assert chat_format.template_origin == "chatml-tools, since the tokenizer's own shows no tools"
    for each in data:
        for example in chat_format.encode(each):
            trained = tokenizer.decode([t for t, flag in zip(example.ids, example.trained, strict=True) if flag])
            answers = [turn for turn in each.fields["messages"] if turn["role"] == "assistant"]
            assert trained.count("<|im_end|>") == len(answers)
            for answer in answers:
                assert answer["content"].strip() in trained
                assert all(call["function"]["name"] in trained for call in answer.get("tool_calls", []))
            for turn in each.fields["messages"]:
                if turn["role"] == "user" and len(turn["content"]) > 40:
                    assert turn["content"] not in trained
