import json

import pytest
from click.testing import CliRunner

from chat_styles import STYLES, chat, make_tokenizer, messages, row
from lorakit.cli import main
from lorakit.cli.check import _tokens, as_seen
from lorakit.data.chat import Example
from lorakit.data.sources import Origin


def check(*arguments):
    return CliRunner().invoke(main, ["check", *map(str, arguments)])


@pytest.fixture
def model(tmp_path):
    """A folder with a tokenizer and a config: check reads no weights."""
    folder = tmp_path / "model"
    STYLES["chatml"]().save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"messages": messages(f"What {i}?", f"Blue {i}.")}) + "\n" for i in range(20)))
    return path


def test_rows_are_shown_as_the_model_will_see_them_then_figures_then_the_verdict(model, data):
    result = check(data, "--model", model, "--rows", 1)
    assert result.exit_code == 0, result.output
    lines = result.stderr.split("\n")
    assert lines[0].startswith(f"{data}:1: ")
    assert "<|im_start|>│user│⏎" in result.stderr
    assert "⟦Blue│ │0│.│<|im_end|>⟧" in result.stderr
    assert "data   20 rows, messages: 19 train, 1 valid held out; 0 cut" in lines
    assert f"ok     these rows can be trained on: lorakit train {data} --model {model} --output runs/NAME" in lines
    assert result.stdout == ""


def test_json_is_the_last_line_of_stdout(model, data):
    result = check(data, "--model", model, "--json", "--max-length", 64, "--valid", data)
    found = json.loads(result.stdout.strip().split("\n")[-1])
    assert found["ok"] is True
    assert found["training"]["rows"] == found["validation"]["rows"] == found["overlap"]["rows"] == 20
    assert found["training"]["max_length"] == 64
    assert "--validation" in result.stderr.split("ok ")[-1]
    assert "--max_length 64" in result.stderr.split("ok ")[-1]


def test_json_holds_the_tokens_of_the_rows_shown(model, data):
    result = check(data, "--model", model, "--json", "--rows", 2)
    rows = json.loads(result.stdout.strip().split("\n")[-1])["rows"]
    assert [row["origin"] for row in rows] == [f"{data}:1", f"{data}:2"]
    (example,) = chat(STYLES["chatml"]()).encode(row(messages=messages("What 0?", "Blue 0.")))
    assert [token for token, _, _ in rows[0]["tokens"]] == example.ids
    assert [trained for _, _, trained in rows[0]["tokens"]] == example.trained
    assert "".join(text for _, text, _ in rows[0]["tokens"]).endswith("<|im_start|>assistant\nBlue 0.<|im_end|>")
    assert rows[0]["tokens"][-1][1:] == ["<|im_end|>", True]
    assert json.loads(check(data, "--model", model, "--json", "--rows", 0).stdout)["rows"] == []


def test_tokens_are_kept_unless_told_not_to(model, data, tmp_path, monkeypatch):
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lorakit.data.token_cache.WORTHWHILE", 0)
    without = check(data, "--model", model, "--no-token-cache")
    assert without.exit_code == 0, without.output
    assert not (tmp_path / "cache").exists()
    assert check(data, "--model", model).output == without.output
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 2  # training and validation rows
    assert check(data, "--model", model).output == without.output


@pytest.mark.parametrize("count", [1, 3])
def test_rows_that_leave_nothing_to_hold_out_are_shown_all_the_same(model, data, count):
    data.write_text((json.dumps({"messages": messages("What?", "Blue.")}) + "\n") * count)
    result = check(data, "--model", model, "--json")
    assert result.exit_code == 0, result.output
    assert "⟦Blue│.│<|im_end|>⟧" in result.stderr
    assert f"data   {count} rows, messages; 0 cut" in result.stderr
    assert "note   train will need --validation FILE: no validation rows can be held out of" in result.stderr
    assert f"lorakit train {data} --model {model} --validation FILE --output" in result.stderr
    found = json.loads(result.stdout)
    assert (found["ok"], found["training"]["rows"], found["validation"]) == (True, count, None)
    assert len(found["rows"]) == min(count, 2)


def test_rows_with_tools_are_shown_with_the_template_that_shows_them(model, data):
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "get_weather", "arguments": None}]}
    data.write_text(json.dumps({"messages": [*messages("What?"), call], "tools": [{"name": "get_weather"}]}) + "\n")
    result = check(data, "--model", model)
    assert result.exit_code == 0, result.output
    assert "template: chatml-tools, since the tokenizer's own shows no tools" in result.stderr
    assert "<tools>" in result.stderr.replace("│", "")


def test_a_refusal_exits_with_reasons(model, data):
    with data.open("a") as file:
        file.write('{"message": []}\n{"messages": []}\n')
    result = check(data, "--model", model, "--json")
    assert result.exit_code == 2
    assert f"{data}:21: keys message fit no schema" in result.stderr
    assert f"{data}:22: 'messages': expected a list of messages" in result.stderr
    told = json.loads(result.stdout)
    assert (told["ok"], told["error"]["type"]) == (False, "DataError")
    assert f"{data}:21: keys message fit no schema" in told["error"]["message"]


def test_settings_may_come_from_a_file(model, data, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {model}\nmax_length: 40\nrows: 0\n")
    result = check(data, "--config", config)
    assert result.exit_code == 0, result.output
    assert "--max_length 40" in result.stderr
    assert "⟦" not in result.stderr


def test_the_middle_of_a_long_stretch_is_counted():
    tokenizer = STYLES["gemma"]()
    (example,) = chat(tokenizer).encode(row(messages=messages("What is the answer? " * 60, "Blue.")))
    text = as_seen(example, tokenizer).plain
    assert text.startswith("<s>│<start_of_turn>│user│⏎\n│What│ is│ the")
    assert " … " in text
    assert text.endswith("⟦Blue│.│<end_of_turn>⟧")


def test_a_character_of_several_tokens_comes_in_one_piece():
    tokenizer = make_tokenizer()
    ids = [*tokenizer("a é 🙂").input_ids, tokenizer.eos_token_id]
    assert len(ids) > 8
    example = Example(ids, [False] * 2 + [True] * (len(ids) - 2), Origin("a", 1))
    text = as_seen(example, tokenizer).plain
    assert "é" in text
    assert "🙂" in text
    assert "\ufffd" not in text
    tokens = _tokens(example, tokenizer)
    assert [token for token, _, _ in tokens] == ids
    assert "".join(text for _, text, _ in tokens) == "a é 🙂" + tokenizer.eos_token


def test_trained_tokens_are_green():
    tokenizer = STYLES["gemma"]()
    (example,) = chat(tokenizer).encode(row(messages=messages("What?", "Blue.")))
    text = as_seen(example, tokenizer)
    green = "".join(text.plain[span.start : span.end] for span in text.spans if span.style == "green")
    assert green == "Blue.<end_of_turn>"


@pytest.mark.real_model
def test_smollm2(smollm2, shared_data):
    train = shared_data / "e2e_nlg" / "valid.jsonl"
    result = check(train, "--model", smollm2, "--rows", 1)
    assert result.exit_code == 0, result.output
    assert "⟦" in result.stderr
    assert "end token in 40 of 40; prompt = serving prompt" in result.stderr
