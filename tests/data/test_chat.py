import datetime
import json

import pytest
from transformers.utils import chat_template_utils

from chat_styles import (
    CHATML,
    END_ONCE,
    GEMMA,
    LLAMA3,
    NO_END,
    QWEN3,
    STYLES,
    THINK_WHEN_ASKED,
    chat,
    make_tokenizer,
    marked,
    messages,
    row,
    tokens,
)
from lorakit.data.schema import parse_prompt
from lorakit.errors import ConfigError, DataError, ModelError


def marks(style, fields, **options):
    tokenizer = STYLES[style]() if isinstance(style, str) else style
    return [marked(example, tokenizer) for example in chat(tokenizer, **options).encode(row(**fields))]


# ---------------------------------------------------------------- token by token


def test_chatml_token_by_token():
    tokenizer = STYLES["chatml"]()
    (example,) = chat(tokenizer).encode(row(messages=messages("Name a colour.", "Blue.")))
    assert tokens(example, tokenizer) == [
        ("<|im_start|>", False), ("system", False), ("\n", False), ("You", False), (" are", False), (" helpful", False),
        ("<|im_end|>", False), ("\n", False),
        ("<|im_start|>", False), ("user", False), ("\n", False), ("Name", False), (" a", False), (" colour", False),
        (".", False), ("<|im_end|>", False), ("\n", False),
        ("<|im_start|>", False), ("assistant", False), ("\n", False), ("Blue", True), (".", True), ("<|im_end|>", True),
    ]  # fmt: skip


def test_llama3_token_by_token():
    tokenizer = STYLES["llama3"]()
    (example,) = chat(tokenizer).encode(row(messages=messages("Name a colour.", " Blue. ", "What?", "Red.")))
    assert tokens(example, tokenizer) == [
        ("<|begin_of_text|>", False),
        ("<|start_header_id|>", False), ("user", False), ("<|end_header_id|>", False), ("\n", False), ("\n", False),
        ("Name", False), (" a", False), (" colour", False), (".", False), ("<|eot_id|>", False),
        ("<|start_header_id|>", False), ("assistant", False), ("<|end_header_id|>", False),
        ("\n", False), ("\n", False),
        ("Blue", True), (".", True), ("<|eot_id|>", True),
        ("<|start_header_id|>", False), ("user", False), ("<|end_header_id|>", False), ("\n", False), ("\n", False),
        ("What", False), ("?", False), ("<|eot_id|>", False),
        ("<|start_header_id|>", False), ("assistant", False), ("<|end_header_id|>", False),
        ("\n", False), ("\n", False),
        ("Red", True), (".", True), ("<|eot_id|>", True),
    ]  # fmt: skip


def test_qwen3_strips_thoughts_from_history_token_by_token():
    tokenizer = STYLES["qwen3"]()
    fields = messages("What?", "<think>\nhere\n</think>\n\nBlue.", "and?", "Red.")
    first, second = chat(tokenizer).encode(row(messages=fields))
    start = [
        ("<|im_start|>", False),
        ("user", False),
        ("\n", False),
        ("What", False),
        ("?", False),
        ("<|im_end|>", False),
    ]
    ask = [("\n", False), ("<|im_start|>", False), ("assistant", False), ("\n", False)]
    merged = "".join(text for text, trained in tokens(first, tokenizer) if trained)
    assert merged == "<think>\nhere\n</think>\n\nBlue.<|im_end|>"
    assert [each for each in tokens(first, tokenizer) if not each[1]] == start + ask
    assert tokens(first, tokenizer)[: len(start + ask)] == start + ask
    # in serving, the first answer stands in the history without its thoughts: so it does here, and is not trained again
    history = [("Blue", False), (".", False), ("<|im_end|>", False), ("\n", False)]
    question = [
        ("<|im_start|>", False),
        ("user", False),
        ("\n", False),
        ("and", False),
        ("?", False),
        ("<|im_end|>", False),
    ]
    context = start + ask + history + question + ask
    assert tokens(second, tokenizer)[: len(context)] == context
    answer = tokens(second, tokenizer)[len(context) :]
    assert all(trained for _, trained in answer)
    assert "".join(text for text, _ in answer) == "<think>\n\n</think>\n\nRed.<|im_end|>"


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        (
            "chatml",
            "<|im_start|>system\nYou are helpful<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"
            "⟦Blue.<|im_end|>⟧\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n⟦Red.<|im_end|>⟧",
        ),
        ("mistral", "<s>[INST] What? [/INST]⟦Blue.</s>⟧[INST] and? [/INST]⟦Red.</s>⟧"),
        (
            "gemma",
            "<s><start_of_turn>user\nWhat?<end_of_turn>\n<start_of_turn>model\n⟦Blue.<end_of_turn>⟧\n"
            "<start_of_turn>user\nand?<end_of_turn>\n<start_of_turn>model\n⟦Red.<end_of_turn>⟧",
        ),
        (
            "phi3",
            "<|user|>\nWhat?<|end|>\n<|assistant|>\n⟦Blue.<|end|>⟧\n<|user|>\nand?<|end|>\n<|assistant|>\n⟦Red.<|end|>⟧",
        ),
    ],
)
def test_every_answer_and_its_end_is_trained_and_nothing_else(style, expected):
    assert marks(style, {"messages": messages("What?", "Blue.", "and?", "Red.")}) == [expected]


@pytest.mark.parametrize("style", STYLES)
def test_every_trained_token_follows_exactly_the_prompt_of_serving(style):
    """The whole promise, checked against transformers' own way from messages to prompt ids."""
    tokenizer = STYLES[style]()
    turns = messages("What is two and two?", "The answer is four.", "Name a colour.", "Blue.", "and?", "Red.")
    examples = chat(tokenizer).encode(row(messages=turns))
    found = []
    for example in examples:
        starts = [i for i, t in enumerate(example.trained) if t and not example.trained[i - 1]]
        found += [example.ids[:start] for start in starts]
    expected = [
        tokenizer.apply_chat_template(turns[:place], add_generation_prompt=True, tokenize=True, return_dict=False)
        for place in (1, 3, 5)
    ]
    assert found == expected


# ---------------------------------------------------------------- the end token


@pytest.mark.parametrize("style", STYLES)
def test_the_end_token_is_trained_though_it_is_the_padding_token(style):
    tokenizer = STYLES[style]()
    chat_format = chat(tokenizer)
    (example,) = chat_format.encode(row(messages=messages("What?", "Blue.")))
    assert example.trained[-1]
    assert example.ids[-1] in chat_format.stop_ids
    assert example.ends
    assert not example.eos_appended


ANSWERED = {  # what is trained of the answer "four", as each style writes it
    "chatml": "four<|im_end|>",
    "llama3": "four<|eot_id|>",
    "qwen3": "<think>\n\n</think>\n\nfour<|im_end|>",
    "mistral": "four</s>",
    "gemma": "four<end_of_turn>",
    "phi3": "four<|end|>",
}


@pytest.mark.parametrize("pad_is_end", [True, False])
@pytest.mark.parametrize(("style", "answer"), ANSWERED.items())
def test_labels_of_a_cut_row_token_by_token(style, answer, pad_is_end):
    """The prompt gives way, the answer and its end stay trained, each token of them, whatever the padding token is."""
    tokenizer = STYLES[style]()
    tokenizer.pad_token = tokenizer.eos_token if pad_is_end else "<|start_header_id|>"
    question = "What is the answer? " * 30
    (whole,) = chat(tokenizer).encode(row(messages=messages(question, "four")))
    (cut,) = chat(tokenizer, max_length=40).encode(row(messages=messages(question, "four")))
    expected = tokenizer(answer, add_special_tokens=False).input_ids
    for example in (whole, cut):
        assert example.ids[-len(expected) :] == expected
        assert example.trained == [False] * (len(example.ids) - len(expected)) + [True] * len(expected)
        assert example.ends
    assert len(cut.ids) == 40
    assert cut.prompt_cut == len(whole.ids) - 40
    assert whole.prompt_cut == cut.answer_cut == 0


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("nothing", ["", "  \n"])
def test_an_empty_answer_is_refused_and_not_trained_as_silence(style, nothing):
    with pytest.raises(DataError, match="turn 2: the assistant's content is empty"):
        chat(STYLES[style]()).encode(row(messages=messages("Name a colour.", nothing)))


def test_a_template_without_an_end_gets_the_end_token_and_each_answer_an_example():
    tokenizer = make_tokenizer(NO_END)
    examples = chat(tokenizer).encode(row(messages=messages("What?", "Blue.", "and?", "Red.")))
    assert [marked(example, tokenizer) for example in examples] == [
        "### user:\nWhat?\n\n### assistant:\n⟦Blue.\n\n<|endoftext|>⟧",
        "### user:\nWhat?\n\n### assistant:\nBlue.\n\n### user:\nand?\n\n### assistant:\n⟦Red.\n\n<|endoftext|>⟧",
    ]
    assert all(example.eos_appended for example in examples)


def test_a_template_that_ends_only_the_last_answer():
    tokenizer = make_tokenizer(END_ONCE)
    examples = chat(tokenizer).encode(row(messages=messages("What?", "Blue.", "and?", "Red.")))
    assert [marked(example, tokenizer) for example in examples] == [
        "### user:\nWhat?\n\n### assistant:\n⟦Blue.\n\n<|endoftext|>⟧",
        "### user:\nWhat?\n\n### assistant:\nBlue.\n\n### user:\nand?\n\n### assistant:\n⟦Red.\n\n<|endoftext|>⟧",
    ]
    assert not any(example.eos_appended for example in examples)


def test_an_answer_that_holds_the_end_token_is_refused():
    with pytest.raises(
        DataError, match=r"data.jsonl:1: turn 2: the answer holds '<\|im_end\|>', at which generation stops"
    ):
        marks("chatml", {"messages": messages("What?", "Blue.<|im_end|> and more")})


def test_a_call_that_holds_the_end_token_is_refused():
    call = {**CALL, "tool_calls": [{"function": {"name": "get_weather", "arguments": {"city": "a<|im_end|>"}}}]}
    with pytest.raises(DataError, match="at which generation stops"):
        marks("chatml", {"messages": [TOOL_TURNS[0], call]}, chat_template="chatml-tools")


def test_a_marker_in_the_text_is_no_marker():
    question = "Say '<|im_start|>assistant\nRed.' and '### assistant:\n'"
    (text,) = marks("chatml", {"messages": messages(question, "Blue.")})
    assert text.count("⟦") == 1
    assert text.endswith("⟦Blue.<|im_end|>⟧")
    assert "Red." in text.split("⟦")[0]


def test_a_tokenizer_without_an_end_token_is_refused():
    with pytest.raises(ModelError, match="names no end token"):
        chat(make_tokenizer(eos=None))


# ---------------------------------------------------------------- BOS


@pytest.mark.parametrize(("style", "bos"), [("llama3", "<|begin_of_text|>"), ("mistral", "<s>"), ("gemma", "<s>")])
def test_bos_is_not_doubled(style, bos):
    tokenizer = STYLES[style]()
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id  # the trap: the tokenizer adds it too
    (text,) = marks(style, {"messages": messages("What?", "Blue.")})
    assert text.startswith(bos)
    assert text.count(bos) == 1


def test_plain_text_has_the_tokenizers_bos_once():
    assert marks("llama3", {"text": "Blue."}) == ["<|begin_of_text|>⟦Blue.<|end_of_text|>⟧"]
    assert marks("llama3", {"text": "<|begin_of_text|>Blue."}) == ["<|begin_of_text|>⟦Blue.<|end_of_text|>⟧"]
    assert marks("llama3", {"prompt": "What?", "completion": " Blue."}, chat_template="none") == [
        "<|begin_of_text|>What?⟦ Blue.<|end_of_text|>⟧"
    ]


def test_a_shipped_template_begins_as_the_tokenizer_begins_a_text():
    (text,) = marks("llama3", {"messages": messages("What?", "Blue.")}, chat_template="chatml")
    assert text == (
        "<|begin_of_text|><|im_start|>user\nWhat?<|end_of_text|>\n<|im_start|>assistant\n⟦Blue.<|end_of_text|>⟧"
    )
    (text,) = marks("chatml", {"messages": messages("What?", "Blue.")}, chat_template="chatml")
    assert text == "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n⟦Blue.<|im_end|>⟧"


# ---------------------------------------------------------------- prompt of training = prompt of generation


def test_a_template_whose_prompt_differs_from_its_history_is_refused_with_both():
    tokenizer = make_tokenizer(THINK_WHEN_ASKED, eos="<|im_end|>")
    with pytest.raises(DataError) as caught:
        chat(tokenizer).encode(row(messages=messages("What?", "Blue.")))
    assert "prompt of training differs from prompt of generation" in str(caught.value)
    assert r"<|im_start|>assistant\n<think>\n" in str(caught.value)
    assert r"<|im_start|>assistant\nBlue." in str(caught.value)


def test_an_answer_the_template_changes_is_refused():
    loses_thoughts = CHATML.replace("message['content'] +", "message['content'].split('</think>')[-1] +")
    tokenizer = make_tokenizer(loses_thoughts, eos="<|im_end|>")
    with pytest.raises(DataError, match="changes the assistant's answer"):
        chat(tokenizer).encode(row(messages=messages("What?", "<think>here</think>Blue.")))


def test_a_turn_the_template_leaves_out_is_refused():
    no_system = CHATML.replace(
        "{{'<|im_start|>' + m", "{% if message['role'] == 'system' %}{% continue %}{% endif %}{{'<|im_start|>' + m"
    )
    tokenizer = make_tokenizer(no_system, eos="<|im_end|>")
    with pytest.raises(DataError, match=r"leaves out the system turn 1: 'You name colours\.'"):
        chat(tokenizer).encode(row(messages=messages("What?", "Blue.", system="You name colours.")))


def test_a_template_that_raises_gives_its_reason():
    with pytest.raises(DataError, match=r"refuses the turns \(system, user\): System role not supported"):
        marks("gemma", {"messages": messages("What?", "Blue.", system="Be kind")})
    twice = [*messages("What?", "Blue."), {"role": "assistant", "content": "Red."}]
    with pytest.raises(DataError, match="roles must alternate"):
        marks("mistral", {"messages": twice})


def test_consecutive_answers_are_each_trained_where_the_template_allows_them():
    twice = [*messages("What?", "Blue."), {"role": "assistant", "content": "Red."}]
    (text,) = marks("llama3", {"messages": twice})
    assert text.endswith("⟦Blue.<|eot_id|>⟧<|start_header_id|>assistant<|end_header_id|>\n\n⟦Red.<|eot_id|>⟧")


def test_reasoning_is_trained_or_refused():
    turns = messages("What?", "Blue.")
    turns[1]["reasoning_content"] = "here"
    (text,) = marks("qwen3", {"messages": turns})
    assert text.endswith("⟦<think>\nhere\n</think>\n\nBlue.<|im_end|>⟧")
    with pytest.raises(DataError, match="leaves out the assistant's reasoning"):
        marks("chatml", {"messages": turns})


def test_an_assistant_turn_without_a_prompt_is_refused():
    with pytest.raises(DataError, match="there is no prompt that it answers"):
        marks("chatml", {"messages": [{"role": "assistant", "content": "Blue."}]})


# ---------------------------------------------------------------- which turns are trained


def test_weight_zero_is_context_only():
    turns = messages("What?", "Blue.", "and?", "Red.")
    turns[1]["weight"] = 0
    (text,) = marks("gemma", {"messages": turns})
    assert text == (
        "<s><start_of_turn>user\nWhat?<end_of_turn>\n<start_of_turn>model\nBlue.<end_of_turn>\n"
        "<start_of_turn>user\nand?<end_of_turn>\n<start_of_turn>model\n⟦Red.<end_of_turn>⟧"
    )


def test_in_a_prompt_of_messages_nothing_is_trained():
    fields = {"prompt": messages("What?", "Blue.", "and?"), "completion": [{"role": "assistant", "content": "Red."}]}
    (text,) = marks("mistral", fields)
    assert text == "<s>[INST] What? [/INST]Blue.</s>[INST] and? [/INST]⟦Red.</s>⟧"


def test_each_turn_is_trained_once_whatever_the_template_does_with_history():
    turns = messages("What?", "<think>\na\n</think>\n\nBlue.", "and?", "Red.", "and?", "<think>\nb\n</think>\n\nfour.")
    texts = marks("qwen3", {"messages": turns})
    trained = [part.split("⟧")[0] for text in texts for part in text.split("⟦")[1:]]
    assert trained == [
        "<think>\na\n</think>\n\nBlue.<|im_end|>",
        "<think>\n\n</think>\n\nRed.<|im_end|>",
        "<think>\nb\n</think>\n\nfour.<|im_end|>",
    ]


def test_train_on_all_trains_every_token_but_the_first():
    tokenizer = STYLES["llama3"]()
    (example,) = chat(tokenizer, train_on="all").encode(row(messages=messages("What?", "Blue.")))
    assert example.trained == [False] + [True] * (len(example.ids) - 1)
    assert tokenizer.decode(example.ids).endswith("Blue.<|eot_id|>")


# ---------------------------------------------------------------- strings


def test_strings_become_turns_with_a_template_and_stay_strings_without():
    fields = {"prompt": "What?", "completion": "Blue."}
    assert marks("mistral", fields) == ["<s>[INST] What? [/INST]⟦Blue.</s>⟧"]
    assert marks("chatml", fields, chat_template="none") == ["What?⟦Blue.<|im_end|>⟧"]
    assert marks(make_tokenizer(), fields) == ["What?⟦Blue.<|endoftext|>⟧"]


def test_a_completion_may_bring_its_own_end_token_once():
    fields = {"prompt": "What?", "completion": " Blue.<|endoftext|>\n"}
    tokenizer = make_tokenizer()
    (example,) = chat(tokenizer).encode(row(**fields))
    assert marked(example, tokenizer) == "What?⟦ Blue.<|endoftext|>⟧"
    assert not example.eos_appended
    with pytest.raises(DataError, match="'completion' holds"):
        chat(tokenizer).encode(row(prompt="What?", completion="Blue.<|endoftext|>Red."))


def test_a_token_that_would_span_the_border_is_parted():
    tokenizer = make_tokenizer()
    assert len(tokenizer("answer").input_ids) == 1  # the trap: together they are one token
    (example,) = chat(tokenizer).encode(row(prompt="ans", completion="wer"))
    assert example.ids == [*tokenizer("ans").input_ids, *tokenizer("wer").input_ids, tokenizer.eos_token_id]
    assert marked(example, tokenizer) == "ans⟦wer<|endoftext|>⟧"


def test_an_empty_prompt_still_leaves_a_label():
    (example,) = chat(make_tokenizer()).encode(row(prompt="", completion="Blue."))
    assert not example.trained[0]
    assert all(example.trained[1:])
    assert len(example.ids) >= 2


def test_messages_without_a_template_propose_one():
    with pytest.raises(DataError, match="use --chat-template chatml"):
        marks(make_tokenizer(), {"messages": messages("What?", "Blue.")})


def test_long_text_is_cut_into_windows_and_nothing_is_lost():
    tokenizer = make_tokenizer()
    text = "the answer is here. " * 40
    ids = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    examples = chat(tokenizer, max_length=50).encode(row(text=text))
    assert max(len(example.ids) for example in examples) == 50
    targets = [token for e in examples for token, trained in zip(e.ids, e.trained, strict=True) if trained]
    assert targets == ids[1:]
    assert [example.ends for example in examples] == [False] * (len(examples) - 1) + [True]


# ---------------------------------------------------------------- rows that are too long


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("max_length", [2, 3, 5, 16, 31, 32, 33, 64, 100])
def test_no_limit_leaves_a_row_without_a_label(style, max_length):
    turns = messages("What is the answer? " * 20, "The answer is four.", "Name a colour.", "Blue. " * 30)
    for example in chat(STYLES[style](), max_length=max_length).encode(row(messages=turns)):
        assert len(example.ids) <= max_length
        assert any(example.trained)
        assert not example.trained[0]


def test_a_long_prompt_is_cut_behind_its_system_turn_and_the_end_token_stays():
    tokenizer = STYLES["llama3"]()
    turns = messages("What is the answer? " * 30, "Blue.", system="You name")
    (example,) = chat(tokenizer, max_length=64).encode(row(messages=turns))
    text = marked(example, tokenizer)
    assert len(example.ids) == 64
    assert text.startswith("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou name<|eot_id|>")
    assert text.endswith("answer?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦Blue.<|eot_id|>⟧")
    whole = chat(tokenizer, max_length=10_000).encode(row(messages=turns))[0]
    assert example.prompt_cut == len(whole.ids) - 64
    assert not example.answer_cut
    assert example.ends


def test_a_long_prompt_without_a_system_turn_keeps_bos():
    tokenizer = STYLES["mistral"]()
    (example,) = chat(tokenizer, max_length=32).encode(row(messages=messages("What is the answer? " * 30, "Blue.")))
    assert example.ids[0] == tokenizer.bos_token_id
    assert marked(example, tokenizer).endswith(" [/INST]⟦Blue.</s>⟧")


def test_a_long_answer_leaves_the_prompt_a_quarter_and_says_that_its_end_is_lost():
    tokenizer = STYLES["mistral"]()
    (example,) = chat(tokenizer, max_length=40).encode(
        row(messages=messages("What is the answer? " * 30, "four " * 80))
    )
    assert len(example.ids) == 40
    assert example.trained == [False] * 10 + [True] * 30
    assert not example.ends
    assert example.answer_cut > 0
    assert not example.eos_appended


def test_later_turns_of_a_long_conversation_are_trained_with_as_much_context_as_fits():
    tokenizer = STYLES["gemma"]()
    turns = messages("What is the answer? " * 3, "four.", "Name a colour. " * 3, "Blue.", "and? " * 3, "Red.")
    examples = chat(tokenizer, max_length=48).encode(row(messages=turns))
    trained = [part.split("⟧")[0] for e in examples for part in marked(e, tokenizer).split("⟦")[1:]]
    assert trained == ["four.<end_of_turn>", "Blue.<end_of_turn>", "Red.<end_of_turn>"]
    assert not examples[0].prompt_cut
    assert any(e.prompt_cut for e in examples)
    assert all(len(e.ids) <= 48 for e in examples)


# ---------------------------------------------------------------- tools

TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}]
WEATHER = {"name": "get_weather", "arguments": '{"city": "Paris"}'}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "type": "function", "function": WEATHER}]}
TOOL_TURNS = [
    {"role": "user", "content": "What?"},
    CALL,
    {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    {"role": "assistant", "content": "sunny."},
]


def test_a_template_that_ignores_tools_is_refused_and_another_proposed():
    with pytest.raises(DataError, match=r"does not show the tool 'get_weather'; .* --chat-template chatml-tools"):
        marks("chatml", {"messages": TOOL_TURNS, "tools": TOOLS})
    with pytest.raises(DataError, match=r"call of 'get_weather'; .* --chat-template chatml-tools"):
        marks("chatml", {"messages": TOOL_TURNS})
    with pytest.raises(DataError, match="this template has no tools; use chatml-tools"):
        marks("chatml", {"messages": TOOL_TURNS}, chat_template="chatml")


def test_chatml_tools_trains_the_call_and_the_answer_but_not_the_result():
    (text,) = marks("chatml", {"messages": TOOL_TURNS, "tools": TOOLS}, chat_template="chatml-tools")
    assert text == (
        "<|im_start|>system\n# Tools\n\nYou may call one or more of these functions:\n<tools>\n"
        '{"type": "function", "function": '
        '{"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}\n'
        "</tools>\n\nTo call a function, answer with a JSON object of its name and arguments:\n"
        '<tool_call>\n{"name": <function name>, "arguments": <object>}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"
        '⟦<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>⟧\n'
        "<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n⟦sunny.<|im_end|>⟧"
    )


def test_chatml_tools_writes_several_calls_results_and_a_system_turn():
    turns = [
        {"role": "system", "content": "You are helpful"},
        {"role": "user", "content": "What?"},
        {**CALL, "content": "here", "tool_calls": CALL["tool_calls"] * 2},
        {"role": "tool", "content": "sunny"},
        {"role": "tool", "content": "red"},
        {"role": "assistant", "content": "four"},
    ]
    (text,) = marks("chatml", {"messages": turns}, chat_template="chatml-tools")
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    assert text == (
        "<|im_start|>system\nYou are helpful<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>\n"
        f"<|im_start|>assistant\n⟦here\n{call}\n{call}<|im_end|>⟧\n"
        "<|im_start|>user\n<tool_response>\nsunny\n</tool_response>\n<tool_response>\nred\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n⟦four<|im_end|>⟧"
    )


def test_a_tool_result_that_the_template_escapes_is_still_found():
    escaping = CHATML.replace(
        "message['content'] +", "(message['content'] | tojson if message.role == 'tool' else message['content']) +"
    )
    turns = [
        *TOOL_TURNS[:1],
        {"role": "assistant", "content": "here"},
        {"role": "tool", "content": '{"a": "e"}'},
        TOOL_TURNS[3],
    ]
    (text,) = marks(make_tokenizer(escaping, eos="<|im_end|>"), {"messages": turns})
    assert r'"{\"a\": \"e\"}"' in text


TOOL_ROWS = [row(1, messages=messages("What?", "Blue.")), row(2, messages=TOOL_TURNS, tools=TOOLS)]


@pytest.mark.parametrize("fields", [{"messages": TOOL_TURNS, "tools": TOOLS}, {"messages": TOOL_TURNS}])
def test_chatml_that_shows_no_tools_gives_way_to_chatml_tools_where_rows_have_them(fields):
    tokenizer = STYLES["chatml"]()
    chosen = chat(tokenizer).for_rows([TOOL_ROWS[0], row(2, **fields)])
    wanted = chat(tokenizer, chat_template="chatml-tools")
    assert chosen.template == chosen.tokenizer.chat_template == wanted.template
    assert chosen.template_origin == "chatml-tools, since the tokenizer's own shows no tools"
    assert chosen.encode(row(2, **fields)) == wanted.encode(row(2, **fields))
    # saved beside an adapter, it is the tokenizer's own, and shows them
    saved = chat(chosen.tokenizer)
    assert saved.for_rows(TOOL_ROWS) is saved


def test_rows_without_tools_and_bad_rows_change_no_template():
    chat_format = chat(STYLES["chatml"]())
    assert chat_format.for_rows([TOOL_ROWS[0], row(2, tool=1), row(3, text="a"), row(4, prompt="a")]) is chat_format


@pytest.mark.parametrize("style", ["llama3", "gemma", "mistral", "phi3"])
def test_where_the_own_template_is_not_chatml_tools_are_refused_as_before(style):
    chat_format = chat(STYLES[style]())
    assert chat_format.for_rows(TOOL_ROWS) is chat_format
    with pytest.raises(DataError, match=r"--chat-template chatml-tools|refuses the turns"):
        chat_format.encode(TOOL_ROWS[1])


def test_another_end_token_is_not_the_same_chatml():
    chat_format = chat(make_tokenizer(CHATML, eos="<|endoftext|>"))
    assert chat_format.for_rows(TOOL_ROWS) is chat_format


@pytest.mark.parametrize("choice", ["chatml", "none"])
def test_a_template_that_was_asked_for_stays(choice):
    chat_format = chat(STYLES["chatml"](), chat_template=choice)
    assert chat_format.for_rows(TOOL_ROWS) is chat_format


def test_an_own_template_that_shows_what_the_rows_have_stays():
    shows = "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}" + CHATML
    chat_format = chat(make_tokenizer(shows, eos="<|im_end|>"))
    only_tools = row(messages=messages("What?", "Blue."), tools=TOOLS)
    assert chat_format.for_rows([only_tools]) is chat_format
    assert chat_format.for_rows(TOOL_ROWS) is not chat_format  # it shows no calls


# ---------------------------------------------------------------- the date

DATED = CHATML.replace("You are helpful", "Today is ' + strftime_now('%d %b %Y') + strftime_now( \"%Y\" ) + '")


@pytest.fixture
def on_day(monkeypatch):
    """Sets the clock that chat templates see."""

    def set_clock(day):
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return cls(2031, 5, day, tzinfo=tz)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)

    return set_clock


def test_rows_are_the_same_tomorrow(on_day):
    tokenizer = make_tokenizer(DATED, eos="<|im_end|>")
    data = [row(messages=messages("What?", "Blue.", "and?", "Red.")), row(messages=TOOL_TURNS, tools=TOOLS)]
    asked = row(prompt="What?", references=["Blue."])
    seen = []
    for day in (1, 2):
        on_day(day)
        chat_format = chat(tokenizer)
        (example,) = chat_format.encode(data[0])
        seen.append((example, chat_format.prompt(data[0]), chat_format.prompt(asked), chat_format.template))
        assert "Today is 26 Jul 20242024<|im_end|>" in marked(example, tokenizer)
        assert chat_format.template_origin == "the tokenizer's own, dated 26 July 2024"
        # what is saved, and what somebody asks, has the day's own date
        assert chat_format.tokenizer.chat_template == DATED
        today = f"Today is 0{day} May 20312031<|im_end|>"
        assert today in tokenizer.decode(chat_format.prompt_ids("What?"))
        assert today in tokenizer.decode(chat_format.ids_before_answer(parse_prompt(data[0])))
    assert seen[0] == seen[1]


def test_a_long_row_keeps_its_dated_head(on_day):
    on_day(1)
    tokenizer = make_tokenizer(DATED.replace("messages[0]['role'] != 'system'", "true"), eos="<|im_end|>")
    turns = messages("What is the answer? " * 40, "Blue.", system="You name")
    (example,) = chat(tokenizer, max_length=100).encode(row(messages=turns))
    assert "26 Jul 2024" in marked(example, tokenizer)


# ---------------------------------------------------------------- prompts


@pytest.mark.parametrize("style", STYLES)
def test_the_prompt_of_a_row_is_what_its_last_answer_was_trained_behind(style):
    tokenizer = STYLES[style]()
    turns = messages("What?", "Blue.", "and?", "Red.")
    chat_format = chat(tokenizer)
    prompt = chat_format.prompt(row(messages=turns))
    last = chat_format.encode(row(messages=turns))[-1]
    assert last.ids[: len(prompt.ids)] == prompt.ids
    assert all(last.trained[len(prompt.ids) :])
    assert prompt.references == ("Red.",)
    assert chat_format.prompt_ids(turns[:-1]) == prompt.ids


def test_references_and_tool_calls_as_the_answer():
    chat_format = chat(STYLES["chatml"](), chat_template="chatml-tools")
    assert chat_format.prompt(row(messages=messages("a", "b"), references=["b", "c"])).references == ("b", "c")
    (answer,) = chat_format.prompt(row(messages=TOOL_TURNS[:2], tools=TOOLS)).references
    ids = chat_format.prompt(row(messages=TOOL_TURNS[:2], tools=TOOLS)).ids
    assert (
        chat_format.prompt_ids(TOOL_TURNS[:1], json.dumps(TOOLS))
        == chat_format.prompt_ids(TOOL_TURNS[:1], TOOLS)
        == ids
    )
    assert answer == '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": messages("What?")},
        {"conversations": [{"from": "human", "value": "What?"}]},
        {"instruction": "What?"},
        {"instruction": "What?", "output": ""},
        {"prompt": "What?"},
        {"prompt": messages("What?")},
    ],
)
def test_a_row_with_references_needs_no_answer_to_be_measured(fields):
    chat_format = chat(STYLES["chatml"]())
    prompt = chat_format.prompt(row(3, **fields, references=["Blue.", "Red."]))
    assert prompt.ids == chat_format.prompt_ids("What?")
    assert prompt.references == ("Blue.", "Red.")
    assert str(prompt.origin) == "data.jsonl:3"
    with pytest.raises(DataError, match=r"data\.jsonl:3: has no answer, and no 'references'"):
        chat_format.prompt(row(3, **fields))
    with pytest.raises(DataError, match=r"data\.jsonl:3: "):  # but the loss needs one
        chat_format.encode(row(3, **fields, references=["Blue.", "Red."]))


def test_turns_after_the_last_answer_are_asked_where_there_are_references():
    chat_format = chat(STYLES["llama3"]())
    turns = messages("What?", "Blue.", "and?")
    assert chat_format.prompt(row(messages=turns, references=["Red."])).ids == chat_format.prompt_ids(turns)
    prompt = chat_format.prompt(row(messages=turns))
    assert (prompt.ids, prompt.references) == (chat_format.prompt_ids("What?"), ("Blue.",))


def test_prompts_without_a_template():
    tokenizer = STYLES["llama3"]()
    chat_format = chat(tokenizer, chat_template="none")
    prompt = chat_format.prompt(row(prompt="What?", completion=" Blue."))
    assert tokenizer.decode(prompt.ids) == "<|begin_of_text|>What?"
    assert prompt.references == (" Blue.",)
    assert chat_format.prompt_ids("What?") == prompt.ids
    assert chat_format.prompt(row(prompt="What?", references=["Blue."])).ids == prompt.ids
    with pytest.raises(DataError, match="a text row has no prompt"):
        chat_format.prompt(row(text="a"))


# ---------------------------------------------------------------- settings


def test_the_tokenizer_to_save_carries_the_template_in_use_and_the_given_one_is_left_alone():
    tokenizer = STYLES["chatml"]()
    chat_format = chat(tokenizer, chat_template="chatml-tools")
    assert chat_format.tokenizer.chat_template == chat_format.template
    assert "<tools>" in chat_format.template
    assert tokenizer.chat_template == CHATML


def test_a_template_file_brings_its_own_end_token(tmp_path):
    path = tmp_path / "gemma.jinja"
    path.write_text(GEMMA)
    tokenizer = STYLES["mistral"]()
    (text,) = marks(tokenizer, {"messages": messages("What?", "Blue.")}, chat_template=str(path))
    assert text == "<s><start_of_turn>user\nWhat?<end_of_turn>\n<start_of_turn>model\n⟦Blue.<end_of_turn>⟧"


def test_of_several_templates_the_default_is_used():
    tokenizer = make_tokenizer({"default": QWEN3, "tool_use": LLAMA3}, eos="<|im_end|>")
    assert chat(tokenizer).template == QWEN3


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="did you mean chatml"):
        chat(make_tokenizer(), chat_template="chatlm")
    with pytest.raises(ConfigError, match="train_on"):
        chat(make_tokenizer(), train_on="user")
    with pytest.raises(ConfigError, match="max_length"):
        chat(make_tokenizer(), max_length=1)
