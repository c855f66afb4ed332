import pytest

from chat_styles import NO_END, STYLES, chat, make_tokenizer, messages, row
from lorakit.data import encoding
from lorakit.data.encoding import encode_rows
from lorakit.data.sources import each_row
from lorakit.errors import DataError

TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "get_weather", "arguments": {"city": "Paris"}}]}
CHAT_ROWS = [
    row(1, messages=messages("Name a colour.", "Blue.")),
    row(2, messages=messages("Name a colour.", "Blue.")),  # the same texts
    row(3, messages=messages("Name a colour.", "Blue.", "And two and two?", "four", "Why?")),
    row(4, messages=messages("What is the answer? " * 40, "Blue.")),
    row(5, messages=messages("What?", "four " * 90)),
    row(6, prompt="What?", completion="Blue."),
    row(7, instruction="Name it.", output="Red.", history=[["a", "b"]]),
    row(8, text="Name a colour. " * 30),
    row(9, text="Blue."),
]


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch):
    monkeypatch.setattr(encoding, "_ROWS_AT_ONCE", 4)


@pytest.mark.parametrize("train_on", ["assistant", "all"])
@pytest.mark.parametrize("style", STYLES)
def test_many_rows_are_encoded_as_each_alone(style, train_on):
    chat_format = chat(STYLES[style](), max_length=64, train_on=train_on)
    assert encode_rows(CHAT_ROWS, chat_format, "") == [chat_format.encode(each) for each in CHAT_ROWS]


@pytest.mark.parametrize(
    ("tokenizer", "options"),
    [
        (make_tokenizer(NO_END), {}),
        (STYLES["chatml"](), {"chat_template": "chatml-tools"}),
        (STYLES["llama3"](), {"chat_template": "none"}),
        (make_tokenizer(), {}),
    ],
)
def test_also_without_an_end_with_tools_and_without_a_template(tokenizer, options):
    chat_format = chat(tokenizer, max_length=48, **options)
    rows = (
        CHAT_ROWS if chat_format.template else [*CHAT_ROWS[5:6], *CHAT_ROWS[7:], row(3, prompt="ans", completion="wer")]
    )
    if options.get("chat_template") == "chatml-tools":
        rows = [*rows, row(10, messages=[*messages("What?"), CALL], tools=[TOOL])]
    assert encode_rows(rows, chat_format, "") == [chat_format.encode(each) for each in rows]


def test_rows_with_system_turns_keep_their_head():
    chat_format = chat(STYLES["chatml"](), max_length=48)
    rows = [row(i, messages=messages(f"What is {i}? " * 30, "Blue.", system="You are helpful")) for i in range(6)]
    found = encode_rows(rows, chat_format, "")
    assert found == [chat_format.encode(each) for each in rows]
    assert all(example.prompt_cut for (example,) in found)


def test_refused_rows_are_told_as_one_by_one():
    chat_format = chat(STYLES["chatml"]())
    bad = [row(20, messages=messages("a", "")), row(21, message=1), row(22, messages=messages("a", "b<|im_end|>c"))]
    rows = [*CHAT_ROWS[:2], *bad[:1], *CHAT_ROWS[2:], *bad[1:]]
    errors = []
    for encode in (each_row, lambda function, rows, complaint: encode_rows(rows, chat_format, complaint)):
        with pytest.raises(DataError) as caught:
            encode(chat_format.encode, rows, "{bad} of {all} are bad")
        errors.append(str(caught.value))
    assert errors[0] == errors[1]
    assert errors[0].startswith("3 of 12 are bad:\n  - data.jsonl:20: ")
    assert "data.jsonl:22: " in errors[0]


def test_no_rows():
    assert encode_rows([], chat(make_tokenizer()), "") == []
