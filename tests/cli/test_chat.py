import json

import pytest
from click.testing import CliRunner

from lorakit import models
from lorakit.cli import main
from lorakit.cli.chat import fitting_prompt
from lorakit.cli.loading import load_subject
from lorakit.errors import ConfigError
from lorakit.generation import generate


def talk(stdin, *arguments):
    fixed = ["chat", "--dtype", "fp32", "--device", "cpu", "--max-new-tokens", "6"]
    result = CliRunner().invoke(main, [*fixed, *arguments], input=stdin)
    assert result.exit_code == 0, result.output
    return result


def answer(base, messages):
    """The library's answer to a conversation."""
    model, tokenizer = models.load_model(base, dtype="fp32", device="cpu")
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return generate(model, tokenizer, [tokenizer.encode(text)], max_new_tokens=6)[0].text


def test_each_turn_sees_the_turns_before(base):
    result = talk("hello\n\nwhat?\n", "--model", base, "--system", "Be brief.", "--json")
    messages = json.loads(result.stdout.splitlines()[-1])["messages"]
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [m["content"] for m in messages if m["role"] == "user"] == ["hello", "what?"]
    assert messages[2]["content"] == answer(base, messages[:2])
    assert messages[4]["content"] == answer(base, messages[:4])


def test_answers_are_streamed_to_stdout(base):
    result = talk("hello\n", "--model", base)
    assert result.stdout.split() == [*answer(base, [{"role": "user", "content": "hello"}]).split(), "[...]"]


def test_with_json_answers_go_to_stderr(base):
    result = talk("hello\n", "--model", base, "--json")
    assert len(result.stdout.splitlines()) == 1
    assert answer(base, [{"role": "user", "content": "hello"}]).split()[0] in result.stderr


def test_commands(base):
    result = talk("hello\n/reset\n/quit\nwhat?\n/exit\nnot read\n", "--model", base, "--system", "Be brief.", "--json")
    messages = json.loads(result.stdout.splitlines()[-1])["messages"]
    assert [m["content"] for m in messages][:2] == ["Be brief.", "what?"]
    assert len(messages) == 3
    assert "/quit is no command: /reset forgets the conversation, /exit ends it" in result.stderr


def test_adapter_names_its_base_and_answers(base, adapter):
    told = json.loads(talk("hello\n", "--adapter", adapter, "--json").stdout.splitlines()[-1])
    assert (told["model"], told["adapter"]) == (base, adapter)
    assert told["messages"][-1]["content"] != answer(base, [{"role": "user", "content": "hello"}])


def test_sampled_turns_draw_anew_and_repeat_with_the_seed(base):
    def answers(seed):
        result = talk("hello\n/reset\nhello\nhello\n", "--model", base, "--temperature", "1", "--seed", seed, "--json")
        return [
            m["content"] for m in json.loads(result.stdout.splitlines()[-1])["messages"] if m["role"] == "assistant"
        ]

    first = answers("0")
    assert first == answers("0")
    assert first != answers("9")
    assert first[0] != first[1]


def test_oldest_turns_are_forgotten_when_the_context_is_full(base):
    subject = load_subject(base, None, "auto", "fp32", "cpu")
    turns = [{"role": role, "content": f"{i}" * 70} for i in range(4) for role in ("user", "assistant")]
    messages = [{"role": "system", "content": "S" * 70}, *turns, {"role": "user", "content": "last"}]
    ids, removed = fitting_prompt(subject, messages, 1, 8)
    assert removed == 4
    assert len(ids) + 8 <= 512
    assert [m["content"][0] for m in messages] == ["S", "2", "2", "3", "3", "l"]
    assert ids == subject.chat_format.prompt_ids(messages)
    with pytest.raises(ConfigError, match="write less"):
        fitting_prompt(subject, [{"role": "user", "content": "x" * 600}], 0, 8)


def test_a_full_context_is_told(base):
    line = "z" * 200
    result = talk(f"{line}\n{line}\n{line}\n", "--model", base)
    assert "(the context is full: the first 2 turns are forgotten)" in result.stderr


def test_one_clear_error():
    result = CliRunner().invoke(main, ["chat"], input="hello\n")
    assert result.exit_code == 2
    assert "no model: name one with --model" in result.stderr
