import json

import pytest

from chat_styles import row
from lorakit.data.schema import (
    Conversation,
    Message,
    PlainText,
    PromptCompletion,
    ToolCall,
    parse_prompt,
    parse_row,
    schema_of,
)
from lorakit.data.sources import read_rows
from lorakit.errors import DataError

USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
TURNS = (Message("user", "a"), Message("assistant", "b"))


def turns(**fields):
    parsed = parse_row(row(**fields))
    assert isinstance(parsed, Conversation)
    return parsed.messages


def refused(**fields):
    with pytest.raises(DataError) as caught:
        parse_row(row(7, **fields))
    assert str(caught.value).startswith("data.jsonl:7: ")
    return str(caught.value)


# ---------------------------------------------------------------- one conversation, many spellings


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [USER, ASSISTANT]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, ASSISTANT]},
        {"messages": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]},
        {"conversations": [USER, ASSISTANT], "system": ""},
        {"instruction": "a", "output": "b"},
        {"instruction": "a", "input": "", "output": "b", "text": "Below is an instruction ... a ... b"},
        {"instruction": "a", "input": None, "output": "b", "history": [], "other": 1},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"prompt": "a", "completion": [ASSISTANT]},
        {"prompt": [USER], "completion": "b"},
        {"messages": [{**USER, "role": "User"}, {**ASSISTANT, "role": "ASSISTANT"}]},
        {"conversations": [{"from": "Human", "value": "a"}, {"from": "GPT", "value": "b"}]},
    ],
)
def test_spellings_of_one_conversation(fields):
    assert turns(**fields) == TURNS


def test_roles_are_those_of_templates():
    parsed = turns(
        messages=[
            {"role": "developer", "content": "s"}, USER, {"role": "assistant", "content": "x"},
            {"role": "tool", "content": "y"}, {"role": "Function", "name": "f", "content": "y"}, ASSISTANT,
        ]
    )  # fmt: skip
    assert [message.role for message in parsed] == ["system", "user", "assistant", "tool", "tool", "assistant"]


def test_alpaca_with_input_system_and_history():
    fields = {"instruction": "a", "input": "x", "output": "b", "system": "s", "history": [["q", "r"]]}
    assert turns(**fields) == (
        Message("system", "s"), Message("user", "q"), Message("assistant", "r"),
        Message("user", "a\n\nx"), Message("assistant", "b"),
    )  # fmt: skip


def test_system_beside_the_turns():
    assert turns(conversations=[USER, ASSISTANT], system="s") == (Message("system", "s"), *TURNS)
    assert turns(messages=[USER, ASSISTANT], system="s") == (Message("system", "s"), *TURNS)
    both = [{"role": "system", "content": "s"}, USER, ASSISTANT]
    assert "has a 'system' key and a system turn" in refused(messages=both, system="t")


def test_prompt_and_completion_as_strings_and_as_messages():
    assert parse_row(row(prompt="a", completion="b", references=["b", "c"])) == PromptCompletion("a", "b", ("b", "c"))
    context = turns(prompt=[USER, ASSISTANT, USER], completion=[ASSISTANT])
    assert [message.trained for message in context if message.role == "assistant"] == [False, True]
    assert "'prompt': expected a string or a list of messages, found int" in refused(prompt=1, completion="b")
    assert "'completion': expected a string or a list of messages, found int" in refused(prompt="a", completion=1)


def test_strings_with_tools_are_turns_so_that_the_tools_are_shown():
    parsed = parse_row(row(prompt="a", completion="b", tools=[{"name": "f"}]))
    assert (parsed.messages, [tool["function"]["name"] for tool in parsed.tools]) == (TURNS, ["f"])


def test_text_and_references():
    assert parse_row(row(text="a")) == PlainText("a")
    assert parse_row(row(messages=[USER, ASSISTANT], references=["b"])).references == ("b",)
    assert parse_row(row(messages=[USER, ASSISTANT], references=[])).references == ()
    for bad in ("b", [1]):
        assert "'references': expected a list of strings" in refused(messages=[USER, ASSISTANT], references=bad)


def test_weight_zero_is_not_trained():
    parsed = turns(messages=[USER, {**ASSISTANT, "weight": 0}, USER, {**ASSISTANT, "weight": 1}])
    assert [message.trained for message in parsed if message.role == "assistant"] == [False, True]
    assert "'weight' must be 0 (context only) or 1, found 0.5" in refused(messages=[USER, {**ASSISTANT, "weight": 0.5}])
    assert "no assistant turn is trained" in refused(messages=[USER, {**ASSISTANT, "weight": 0}])


def test_turns_after_the_last_answer_are_left_out_and_counted():
    parsed = parse_row(row(messages=[USER, ASSISTANT, USER]))
    assert parsed.messages == TURNS
    assert parsed.dropped_turns == 1


# ---------------------------------------------------------------- tools


def test_tool_calls_with_arguments_as_text_or_object():
    for arguments in ('{"x": 1}', {"x": 1}):
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        parsed = turns(messages=[USER, {"role": "assistant", "content": None, "tool_calls": [call]}])
        assert parsed[1] == Message("assistant", "", (ToolCall("f", {"x": 1}, "1"),))
        assert parsed[1].for_template()["tool_calls"] == [{**call, "function": {"name": "f", "arguments": {"x": 1}}}]
    for none in ({"arguments": None}, {"arguments": ""}, {}):
        calls = [{"id": "1", "type": "function", "function": {"name": "f", **none}}]
        assert turns(messages=[USER, {**ASSISTANT, "tool_calls": calls}])[1].tool_calls == (ToolCall("f", {}, "1"),)


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        ({"temp": 21, "sky": "blue é"}, '{"temp":21,"sky":"blue é"}'),
        ([1, {"a": None}], '[1,{"a":null}]'),
        ([], "[]"),
        ([{"type": "text", "text": "x"}, {"type": "text", "text": "y"}], "x\ny"),
        ('{"temp": 21}', '{"temp": 21}'),
    ],
)
def test_what_a_tool_returned_is_text(returned, text):
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
    parsed = turns(messages=[USER, call, {"role": "tool", "content": returned}, ASSISTANT])
    assert parsed[2] == Message("tool", text)
    share_gpt = [{"from": "human", "value": "a"}, {"from": "observation", "value": returned}, ASSISTANT]
    assert turns(conversations=share_gpt)[1] == Message("tool", text)
    assert "content: expected a string" in refused(messages=[{**USER, "content": {"temp": 21}}, ASSISTANT])


def test_tools_as_text_list_or_bare_description():
    bare = {"name": "f", "parameters": {"type": "object"}}
    wrapped = {"type": "function", "function": bare}
    for tools in ([wrapped], [bare], wrapped, bare, *map(json.dumps, ([bare], [wrapped], bare))):
        assert parse_row(row(messages=[USER, ASSISTANT], tools=tools)).tools == (wrapped,)
    assert parse_row(row(messages=[USER, ASSISTANT], tools="")).tools == ()
    assert "'tools': expected a list of tools or one tool" in refused(messages=[USER, ASSISTANT], tools=1)
    assert "a tool needs a function name" in refused(messages=[USER, ASSISTANT], tools=[{"nme": "f"}])
    assert "'tools': not JSON" in refused(messages=[USER, ASSISTANT], tools="[")


def test_share_gpt_function_calls():
    value = json.dumps({"name": "f", "arguments": {"x": 1}})
    conversations = [
        {"from": "human", "value": "a"},
        {"from": "function_call", "value": value},
        {"from": "observation", "value": "y"},
        {"from": "gpt", "value": "b"},
    ]
    parsed = turns(conversations=conversations)
    assert parsed[1].tool_calls[0].name == "f"
    assert parsed[1].tool_calls[0].arguments == {"x": 1}
    assert parsed[2] == Message("tool", "y")
    for as_it_is in (json.loads(value), [json.loads(value)]):
        conversations[1] = {"from": "Function_Call", "value": as_it_is}
        assert turns(conversations=conversations) == parsed
    conversations[1]["value"] = f"[{value}, {value}]"
    assert len({call.id for call in turns(conversations=conversations)[1].tool_calls}) == 2
    conversations[1]["value"] = "f(1)"
    assert "'conversations' turn 2: function call: not JSON" in refused(conversations=conversations)
    conversations[1]["value"] = '{"name": "f", "arguments": [1]}'
    assert "arguments of 'f': expected an object" in refused(conversations=conversations)


# ---------------------------------------------------------------- rows that end before the answer

HUMAN = {"from": "human", "value": "a"}


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [USER]},
        {"messages": [USER, {**ASSISTANT, "content": ""}]},
        {"messages": [USER], "prompt": "a", "prompt_id": "1"},
        {"conversations": [HUMAN]},
        {"instruction": "a"},
        {"instruction": "a", "input": "", "output": ""},
        {"instruction": "a", "output": None},
        {"prompt": [USER]},
        {"prompt": [USER], "completion": []},
        {"prompt": [USER], "completion": " "},
    ],
)
def test_a_row_may_ask_without_an_answer(fields):
    asked = parse_prompt(row(**fields, references=["b", "c"]))
    assert asked == Conversation((Message("user", "a"),), references=("b", "c"))
    assert not asked.answered
    with pytest.raises(DataError, match=r"data\.jsonl:1: "):
        parse_row(row(**fields, references=["b", "c"]))


@pytest.mark.parametrize(
    "fields", [{}, {"completion": None}, {"completion": ""}, {"completion": " \n"}, {"text": "rendered"}]
)
def test_a_prompt_as_a_string_may_ask_without_an_answer(fields):
    asked = parse_prompt(row(prompt="a", references=["b"], **fields))
    assert asked == PromptCompletion("a", "", ("b",))
    assert not asked.answered


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [USER, ASSISTANT]},
        {"instruction": "a", "output": "b"},
        {"prompt": "a", "completion": "b"},
        {"prompt": [USER], "completion": [ASSISTANT]},
    ],
)
def test_a_row_with_an_answer_asks_what_it_trains(fields):
    asked = parse_prompt(row(**fields))
    assert asked == parse_row(row(**fields))
    assert asked.answered


def test_turns_after_an_answer_are_asked():
    assert parse_prompt(row(messages=[USER, ASSISTANT, USER])).messages == (*TURNS, TURNS[0])
    tool = {"role": "tool", "content": "y"}
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
    asked = parse_prompt(row(messages=[USER, call, tool], tools=[{"name": "f"}]))
    assert (asked.messages[-1], asked.answered, len(asked.tools)) == (Message("tool", "y"), False, 1)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"text": "a"}, "a text row has no prompt to answer"),
        ({"prompt": [USER, ASSISTANT]}, "'prompt' ends with an answer and there is no 'completion': nothing is asked"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference training is not in this version"),
        ({"prompt": "a", "instruction": "b"}, "could be alpaca or prompt"),
        ({"message": [USER]}, "did you mean 'messages' for 'message'?"),
        ({"messages": [{"role": "assistant", "content": ""}]}, "the assistant's content is empty"),
    ],
)
def test_rows_that_ask_nothing(fields, reason):
    with pytest.raises(DataError) as caught:
        parse_prompt(row(7, **fields))
    assert str(caught.value).startswith("data.jsonl:7: ")
    assert reason in str(caught.value)


# ---------------------------------------------------------------- what is refused


def test_a_row_of_no_schema_names_the_accepted_keys_and_the_nearest():
    message = refused(message=[USER, ASSISTANT])
    assert "accepted: messages; conversations; instruction + output; prompt + completion; text" in message
    assert "did you mean 'messages' for 'message'?" in message
    assert "keys (none) fit no schema" in refused()
    assert "keys instruction fit no schema" in refused(instruction="a", output=None)
    assert "did you mean" not in refused(prompt="a", references=["b"])


def test_a_row_of_two_schemas_is_refused_and_text_is_no_second_one():
    assert "could be messages or prompt" in refused(messages=[USER, ASSISTANT], prompt="a", completion="b")
    assert schema_of({"messages": [], "text": "rendered"}) == "messages"


def test_preference_rows_are_refused_with_the_reason():
    assert "preference training is not in this version" in refused(prompt="a", chosen="b", rejected="c")


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "'messages': expected a list of messages, found an empty list"),
        ("a", "expected a list of messages, found str"),
        ([USER], "has no assistant turn"),
        ([USER, "b"], "turn 2: expected an object, found str"),
        ([USER, {**ASSISTANT, "content": " \n"}], "turn 2: the assistant's content is empty"),
        ([USER, {"role": "asistant", "content": "b"}], "turn 2: unknown role 'asistant'"),
        ([USER, {"role": "asistant", "content": "b"}], "did you mean 'assistant'?"),
        ([USER, {"role": 3, "content": "b"}], "unknown role 3"),
        ([USER, {"rôle": "assistant", "content": "b"}], "did you mean 'role' for 'rôle'?"),
        (
            [USER, {"role": "assistant", "contents": "b"}],
            "has no 'content' (keys: role, contents); did you mean 'content'",
        ),
        ([USER, {"role": "assistant", "content": None}], "has no 'content'"),
        ([USER, {"role": "assistant", "content": 4}], "content: expected a string or a list of text parts, found int"),
        ([{"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT], "only text parts"),
        ([USER, {"role": "assistant", "content": "", "function_call": {}}], "OpenAI's old spelling"),
        ([{**USER, "tool_calls": [{"name": "f"}]}, ASSISTANT], "only the assistant calls tools"),
        ([USER, {**ASSISTANT, "tool_calls": [{"function": {}}]}], "a tool call needs a function name"),
        ([USER, {**ASSISTANT, "tool_calls": {"name": "f"}}], "'tool_calls': expected a list"),
    ],
)
def test_bad_messages(messages, reason):
    assert reason in refused(messages=messages)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"instruction": "a", "output": ""}, "the assistant's content is empty"),
        ({"instruction": 1, "output": "b"}, "'instruction': expected a string, found int"),
        ({"instruction": "a", "output": "b", "history": [["q"]]}, "'history' 1: expected a pair of strings"),
        ({"instruction": "a", "output": "b", "history": "q"}, "'history': expected a list"),
        ({"prompt": "a", "completion": " "}, "'completion' is empty"),
        ({"text": " "}, "'text' is empty"),
        ({"text": ["a"]}, "'text': expected a string"),
    ],
)
def test_bad_rows_of_other_schemas(fields, reason):
    assert reason in refused(**fields)


# ---------------------------------------------------------------- real data


def said(parsed):
    """What a conversation says, without the ids of its calls."""
    return repr(
        [
            (m.role, m.content, [(call.name, json.dumps(call.arguments)) for call in m.tool_calls])
            for m in parsed.messages
        ]
        + [json.dumps(parsed.tools)]
    )


def test_every_row_of_the_splits_comes_out_of_the_raw_alpaca_file(shared_data):
    folder = shared_data / "alpaca_selfinstruct"
    raw = {said(parse_row(each)) for each in read_rows(folder / "raw" / "alpaca_selfinstruct.json")}
    splits = [each for split in ("train", "valid", "test") for each in read_rows(folder / f"{split}.jsonl")]
    assert len(splits) == 341 + 34 + 52
    assert [str(each.origin) for each in splits if said(parse_row(each)) not in raw] == []


def test_every_row_of_the_splits_comes_out_of_the_raw_share_gpt_file(shared_data):
    folder = shared_data / "glaive_toolcall"
    raw = {said(parse_row(each)) for each in read_rows(folder / "raw" / "sharegpt_glaive.json")}
    splits = [each for split in ("train", "valid", "test") for each in read_rows(folder / f"{split}.jsonl")]
    assert len(splits) == 171 + 19 + 38
    assert [str(each.origin) for each in splits if said(parse_row(each)) not in raw] == []


def test_all_real_data_sets_are_understood(shared_data):
    files = sorted(shared_data.glob("*/*.jsonl"))
    assert len(files) >= 25
    for file in files:
        for each in read_rows(file):
            if "pandalm" in str(file):
                with pytest.raises(DataError, match="preference training is not in this version"):
                    parse_row(each)
            else:
                parse_row(each)
