import json

import pytest
from click.testing import CliRunner

import lorakit
from lorakit import models
from lorakit.cli import main
from lorakit.generation import generate
from tiny_subjects import conversation, write_jsonl


def run(*arguments, stdin=""):
    fixed = ["generate", "--dtype", "fp32", "--device", "cpu", "--max-new-tokens", "7"]
    result = CliRunner().invoke(main, [*fixed, *arguments], input=stdin)
    assert result.exit_code in (0, 2), result.output
    return result


def completions(*arguments, stdin=""):
    result = run(*arguments, "--json", stdin=stdin)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])["completions"]


def expected(base, texts, adapter=None, **sampling):
    """The answers by the library, with ids made from the text of the prompts."""
    model, tokenizer = models.load_model(base, dtype="fp32", device="cpu")
    if adapter is not None:
        lorakit.attach(model, adapter)
    ids = [tokenizer.encode(text) for text in texts]
    return [c.text for c in generate(model, tokenizer, ids, max_new_tokens=7, **sampling)]


def chat(question, system=None):
    start = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    return f"{start}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def test_prompts_from_flags(base):
    found = completions("--model", base, "--prompt", "hello", "--prompt", "what?")
    assert [c["prompt"] for c in found] == ["hello", "what?"]
    assert [c["text"] for c in found] == expected(base, [chat("hello"), chat("what?")])
    assert all(c["tokens"] <= 7 and c["finished"] == (c["tokens"] < 7) for c in found)


def test_answers_go_to_stdout_and_the_rest_to_stderr(base):
    one = run("--model", base, "--prompt", "hello")
    assert one.stdout == expected(base, [chat("hello")])[0] + "\n"
    two = run("--model", base, "--prompt", "hello", "--prompt", "what?")
    assert two.stdout == "".join(text + "\n" for text in expected(base, [chat("hello"), chat("what?")]))
    assert "--- 2: what?" in two.stderr


def test_adapter_names_its_base(base, adapter):
    (found,) = completions("--adapter", adapter, "--prompt", "hello")
    assert found["text"] == expected(base, [chat("hello")], adapter)[0]
    assert found["text"] != expected(base, [chat("hello")])[0]


def test_lines_of_standard_input_and_of_a_text_file(base, tmp_path):
    stdin = completions("--model", base, "--system", "Be brief.", stdin="hello\r\n\nwhat?\n")
    (tmp_path / "prompts.txt").write_text("hello\nwhat?", encoding="utf-8")
    file = completions("--model", base, "--system", "Be brief.", "--file", str(tmp_path / "prompts.txt"))
    assert stdin == file
    assert [c["text"] for c in file] == expected(base, [chat("hello", "Be brief."), chat("what?", "Be brief.")])


def test_raw_continues_the_text(base):
    (found,) = completions("--model", base, "--raw", "--prompt", "once upon")
    assert found["text"] == expected(base, ["once upon"])[0]


def test_rows_with_and_without_answers(base, tmp_path):
    rows = [
        conversation(3),
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "what?"}]},
        {"prompt": "hello"},
        {"prompt": "hello", "completion": "bye"},
        {"prompt": [{"role": "user", "content": "hello"}]},
        {"instruction": "hello", "output": "bye"},
    ]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    found = completions("--model", base, "--file", file)
    texts = [chat(conversation(3)["messages"][0]["content"]), chat("what?", "Be brief."), *[chat("hello")] * 4]
    assert [c["text"] for c in found] == expected(base, texts)
    assert [c["prompt"] for c in found] == [f"{file}:1", "what?", "hello", f"{file}:4", "hello", f"{file}:6"]


def test_rows_of_every_schema_may_end_before_the_answer(base, tmp_path):
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "bye"}]
    rows = [
        {"messages": turns[:1]},
        {"messages": [*turns[:1], {**turns[1], "content": ""}]},
        {"conversations": [{"from": "human", "value": "hello"}]},
        {"conversations": [{"from": "human", "value": "hello"}], "system": "Be brief."},
        {"instruction": "hello"},
        {"instruction": "hello", "input": "", "output": ""},
        {"prompt": "hello", "completion": None},
        {"prompt": turns[:1], "references": ["bye"]},
        {"messages": [*turns, {"role": "user", "content": "what?"}]},
    ]
    found = completions("--model", base, "--file", write_jsonl(tmp_path / "rows.jsonl", rows))
    again = f"{chat('hello')}bye<|im_end|>\n{chat('what?')}"
    texts = [*[chat("hello")] * 3, chat("hello", "Be brief."), *[chat("hello")] * 4, again]
    assert [c["text"] for c in found] == expected(base, texts)
    assert [c["prompt"] for c in found] == ["hello"] * 8 + ["what?"]


def test_sampling_is_that_of_the_library(base):
    found = completions(
        "--model", base, "--temperature", "1.2", "--top-p", "0.9", "--seed", "5", stdin="hello\nhello\n"
    )
    texts = [c["text"] for c in found]
    assert texts == expected(base, [chat("hello")] * 2, temperature=1.2, top_p=0.9, seed=5)
    assert texts[0] != texts[1]


def test_output_file(base, tmp_path):
    output = tmp_path / "answers.jsonl"
    result = run("--model", base, "--prompt", "hello", "--output", str(output))
    assert result.stdout == ""
    (row,) = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert row["text"] == expected(base, [chat("hello")])[0]


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (["--prompt", "x"], "", "no model: name one with --model"),
        (["--model", "BASE"], " \n\n", "standard input: holds no prompt"),
        (["--model", "BASE", "--prompt", "x", "--file", "f"], "", "--prompt and --file"),
        (["--model", "BASE", "--raw", "--system", "s", "--prompt", "x"], "", "--system needs a chat template"),
        (["--model", "BASE", "--file", "none.jsonl"], "", "none.jsonl"),
        (["--model", "BASE", "--file", "none.txt"], "", "none.txt: no such file"),
        (["--model", "BASE", "--file", "LATIN1"], "", "not UTF-8"),
        (["--model", "BASE", "--file", "ROWS"], "", "2 of 3 rows cannot be answered"),
        (["--model", "BASE", "--prompt", "x", "--temperature", "-1"], "", "temperature"),
        (["--model", "BASE", "--prompt", "x", "--adapter", "none"], "", "none"),
    ],
)
def test_one_clear_error(arguments, stdin, message, base, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "x"}, {"text": "x"}, {"messages": [{"role": "usr"}]}])
    latin1 = tmp_path / "latin1.txt"
    latin1.write_bytes(b"caf\xe9\n")
    named = {"BASE": base, "ROWS": rows, "LATIN1": str(latin1)}
    result = run(*[named.get(a, a) for a in arguments], "--json", stdin=stdin)
    assert result.exit_code == 2
    told = json.loads(result.stdout.splitlines()[-1])["error"]["message"]
    assert message in told
    if "ROWS" in arguments:
        assert f"{rows}:2" in told
        assert f"{rows}:3" in told


@pytest.mark.real_model
def test_smollm2_knows_paris(smollm2):
    (found,) = completions("--model", smollm2, "--prompt", "What is the capital of France?", "--max-new-tokens", "12")
    assert "Paris" in found["text"]
