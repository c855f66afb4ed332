import json

import pyarrow
import pyarrow.parquet
import pytest

from lorakit.data.sources import Origin, Row, located, read_rows
from lorakit.errors import DataError


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def fields(path, **options):
    return [dict(row.fields) for row in read_rows(path, **options)]


# ---------------------------------------------------------------- jsonl


def test_jsonl_rows_know_their_line(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"text": "a"}\n\n{"text": "b"}')
    assert read_rows(path) == [
        Row(Origin(str(path), 1), {"text": "a"}),
        Row(Origin(str(path), 3), {"text": "b"}),
    ]
    assert str(read_rows(path)[1].origin) == f"{path}:3"


def test_jsonl_with_bom_and_crlf(tmp_path):
    assert fields(write(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n')) == [
        {"text": "a"},
        {"text": "b"},
    ]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_a_line_ends_at_a_line_feed_only(tmp_path, separator):
    row = {"text": f"a{separator}b"}
    assert fields(write(tmp_path, "a.jsonl", json.dumps(row, ensure_ascii=False) + "\n")) == [row]


def test_bad_rows_are_told_together_and_nothing_is_returned(tmp_path):
    lines = [
        '{"text": "good"}',
        "[1]",
        '{"text": }',
        '{"a": 1, "a": 2}',
        '{"a": NaN}',
        '{"a": "\\ud800"}',
        '{"a": "\0"}',
    ]
    with pytest.raises(DataError) as caught:
        read_rows(write(tmp_path, "a.jsonl", "\n".join(lines)))
    message = str(caught.value)
    assert "6 row(s) cannot be read" in message
    for line, cause in [
        (2, "expected an object {...}, found list"),
        (3, "not JSON: Expecting value at line 1, column 10"),
        (4, "key 'a' given twice"),
        (5, "NaN is not JSON"),
        (6, "lone surrogate"),
        (7, "NUL byte"),
    ]:
        (told,) = [each for each in message.split("\n") if f"a.jsonl:{line}:" in each]
        assert cause in told


def test_twenty_bad_rows_are_listed_and_the_rest_counted(tmp_path):
    with pytest.raises(DataError) as caught:
        read_rows(write(tmp_path, "a.jsonl", "x\n" * 25))
    assert str(caught.value).count("a.jsonl:") == 21  # the head line and 20 rows
    assert "... and 5 more" in str(caught.value)


def test_utf16_is_refused(tmp_path):
    with pytest.raises(DataError, match="is UTF-16; save it as UTF-8"):
        read_rows(write(tmp_path, "a.jsonl", '{"text": "a"}'.encode("utf-16")))


def test_another_encoding_is_told_with_its_line(tmp_path):
    with pytest.raises(DataError, match=r"a\.jsonl:2: not UTF-8: byte 0xe9"):
        read_rows(write(tmp_path, "a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n'))


# ---------------------------------------------------------------- json


def test_json_array_wrapped_array_lines_and_a_lone_row(tmp_path):
    rows = [{"text": "a"}, {"text": "b"}]
    assert fields(write(tmp_path, "a.json", json.dumps(rows))) == rows
    assert fields(write(tmp_path, "a.json", json.dumps({"version": 1, "data": rows}))) == rows
    assert fields(write(tmp_path, "a.json", "\n".join(map(json.dumps, rows)))) == rows
    lone = {"messages": [{"role": "user", "content": "a"}]}
    assert fields(write(tmp_path, "a.json", json.dumps(lone))) == [lone]
    assert [row.origin.line for row in read_rows(write(tmp_path, "a.json", json.dumps(rows, indent=1)))] == [1, 2]


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "a", "output": "b"},
        {"instruction": "a", "output": "b", "tools": [{"name": "f"}]},
        {"conversations": [{"from": "human", "value": "a"}], "tools": [{"name": "f"}]},
        {"prompt": "a", "completion": "b"},
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
        {"prompt": "a", "references": ["b"]},
        {"text": "a"},
    ],
)
def test_json_with_one_row_of_any_schema(tmp_path, row):
    assert fields(write(tmp_path, "a.json", json.dumps(row, indent=1))) == [row]


def test_json_without_one_array_of_objects(tmp_path):
    with pytest.raises(DataError, match=r"found several \(train, test\)"):
        read_rows(write(tmp_path, "a.json", '{"train": [{"a": 1}], "test": [{"a": 1}]}'))
    with pytest.raises(DataError, match="found none; its keys: a"):
        read_rows(write(tmp_path, "a.json", '{"a": 1}'))
    with pytest.raises(DataError, match=r"a\.json:2: expected an object"):
        read_rows(write(tmp_path, "a.json", '[{"a": 1}, 2]'))
    with pytest.raises(DataError, match=r"a\.json: not JSON: Expecting ',' delimiter at line 3"):
        read_rows(write(tmp_path, "a.json", '[{"a": 1},\n{"a": 1}\n{"a": 1}]'))


# ---------------------------------------------------------------- csv, txt


def test_csv_quotes_line_breaks_and_json_cells(tmp_path):
    content = 'instruction,output,tools\r\n"a, b","two\nlines","[{""name"": ""f""}]"\r\nc,d,\r\n'
    path = write(tmp_path, "a.csv", b"\xef\xbb\xbf" + content.encode())
    assert fields(path) == [
        {"instruction": "a, b", "output": "two\nlines", "tools": [{"name": "f"}]},
        {"instruction": "c", "output": "d", "tools": None},
    ]
    assert [row.origin.line for row in read_rows(path)] == [2, 4]


def test_csv_cells_of_prompt_and_completion_are_messages_or_text(tmp_path):
    def cell(value):
        return '"' + (value if isinstance(value, str) else json.dumps(value)).replace('"', '""') + '"'

    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    rows = [
        ([{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]),
        ([{"from": "human", "value": "a"}], [call]),
        ("[INST] a", "[1, 2]"),
        ("[]", '[{"role": "waiter", "table": 3}]'),
        ("a", '[{"quantity": 1}, {"role":'),
    ]
    path = write(tmp_path, "a.csv", "prompt,completion\n" + "".join(f"{cell(a)},{cell(b)}\n" for a, b in rows))
    assert [tuple(found.values()) for found in fields(path)] == rows
    path = write(tmp_path, "b.csv", f"prompt,chosen,rejected\na,{cell(rows[0][1])},b\n")
    assert fields(path) == [{"prompt": "a", "chosen": rows[0][1], "rejected": "b"}]


def test_csv_cells_may_be_long(tmp_path):
    assert fields(write(tmp_path, "a.csv", "text\n" + "a" * 200_000)) == [{"text": "a" * 200_000}]


def test_bad_csv(tmp_path):
    with pytest.raises(DataError, match=r"a\.csv:3: 1 cells under 2 columns \(prompt, completion\)"):
        read_rows(write(tmp_path, "a.csv", "prompt,completion\na,b\nc\n"))
    with pytest.raises(DataError, match=r"a\.csv:2: column 'messages': not JSON"):
        read_rows(write(tmp_path, "a.csv", "messages\nhello\n"))
    with pytest.raises(DataError, match=r"a\.csv:2: column 'completion': not JSON"):  # as str() of a Python list
        read_rows(write(tmp_path, "a.csv", "prompt,completion\na,\"[{'role': 'user', 'content': 'a'}]\"\n"))
    with pytest.raises(DataError, match="names a column twice"):
        read_rows(write(tmp_path, "a.csv", "text,text\na,b\n"))
    with pytest.raises(DataError, match="not CSV"):
        read_rows(write(tmp_path, "a.csv", 'text\n"a\n'))


def test_txt_is_one_document(tmp_path):
    assert fields(write(tmp_path, "a.txt", "one\r\n\r\ntwo\n")) == [{"text": "one\n\ntwo\n"}]
    with pytest.raises(DataError, match="NUL byte at offset 1"):
        read_rows(write(tmp_path, "a.txt", b"a\0b"))
    with pytest.raises(DataError, match=r"a\.txt:2: not UTF-8"):
        read_rows(write(tmp_path, "a.txt", b"a\n\xff"))


# ---------------------------------------------------------------- parquet and data sets

MESSAGES = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {
        "messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "weight": 1}],
        "references": ["d"],
    },
]


def test_parquet_gives_back_what_was_written(tmp_path):
    """Arrow fills keys that only some rows have with None; they are taken out again."""
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(MESSAGES, schema=_arrow_schema()), path)
    assert fields(path) == MESSAGES
    assert [row.origin.line for row in read_rows(path)] == [1, 2]


def _arrow_schema():
    turn = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string()), ("weight", pyarrow.int64())])
    return pyarrow.schema([("messages", pyarrow.list_(turn)), ("references", pyarrow.list_(pyarrow.string()))])


def test_damaged_parquet(tmp_path):
    with pytest.raises(DataError, match="not readable as parquet"):
        read_rows(write(tmp_path, "a.parquet", b"PAR1 nonsense"))


def save_data_set(folder, **splits):
    """A folder as the Hub has them, with splits of any name."""
    folder.mkdir(parents=True)
    files = "".join(f"  - split: {split}\n    path: {split}.jsonl\n" for split in splits)
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n")
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """(id, config) -> folder: what the Hub holds, read by `datasets` as it is."""
    import datasets

    held, load = {}, datasets.load_dataset
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config=None: load(held.get((name, config), name)))
    return held


def test_a_folder_is_read_as_the_hub_would(tmp_path, hub):
    folder = tmp_path / "set"
    folder.mkdir()
    for split, rows in (("train", MESSAGES), ("test", MESSAGES[:1])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert fields(folder) == MESSAGES
    assert fields(folder, split="test") == fields(f"{folder}:test") == MESSAGES[:1]
    with pytest.raises(DataError, match=r"set: has no split nonsense, but train, test: name the one you mean, as in"):
        read_rows(folder, split="nonsense")


def test_splits_and_configs_of_a_data_set(tmp_path, hub):
    one, other = [{"text": "one"}], [{"text": "other"}]
    hub["owner/name", None] = str(save_data_set(tmp_path / "a", train_sft=one, test_sft=other))
    hub["owner/name", "main"] = str(save_data_set(tmp_path / "b", train=other, test=one))
    assert fields("owner/name:train_sft") == fields("owner/name:train_sft", split="test") == one
    assert fields("owner/name:test_sft") == other
    assert fields("owner/name/main") == other
    assert fields("owner/name/main:test") == one
    assert str(read_rows("owner/name/main:test")[0].origin) == "owner/name/main:test:1"
    for name, wanted in (("owner/name", "train"), ("owner/name:tset", "tset")):
        with pytest.raises(DataError) as caught:
            read_rows(name)
        assert str(caught.value) == (
            f"{name}: has no split {wanted}, but train_sft, test_sft: name the one you mean, as in owner/name:train_sft"
        )


def test_of_several_splits_the_first_that_is_there(tmp_path, hub):
    one, other = [{"text": "one"}], [{"text": "other"}]
    hub["a/both", None] = str(save_data_set(tmp_path / "a", train=other, test=other, validation=one))
    hub["a/test", None] = str(save_data_set(tmp_path / "b", train=other, test=one))
    hub["a/none", None] = str(save_data_set(tmp_path / "c", train=other))
    assert fields("a/both", split=("validation", "test")) == fields("a/test", split=("validation", "test")) == one
    with pytest.raises(DataError, match="a/none: has no split validation or test, but train: name the one you mean"):
        read_rows("a/none", split=("validation", "test"))


def test_a_file_has_no_splits(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"text": "a"}')
    with pytest.raises(DataError, match=r"a\.jsonl:train: no such file \(did you mean .*a\.jsonl\?"):
        read_rows(f"{path}:train")


def test_located_names_hold_from_any_folder(tmp_path, monkeypatch):
    write(tmp_path, "a.jsonl", "{}")
    (tmp_path / "set").mkdir()
    monkeypatch.chdir(tmp_path)
    assert located("a.jsonl") == str(tmp_path / "a.jsonl")
    assert located("./set:test") == f"{tmp_path / 'set'}:test"
    assert located("owner/name/main:test") == "owner/name/main:test"


def test_a_data_set_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="owner/name: neither a data file here nor a data set that can be loaded"):
        read_rows("owner/name")


# ---------------------------------------------------------------- what is not there


def test_a_missing_file_proposes_its_neighbours(tmp_path):
    write(tmp_path, "train.jsonl", "{}")
    with pytest.raises(DataError, match=r"trian\.jsonl: no such file \(did you mean .*train\.jsonl"):
        read_rows(tmp_path / "trian.jsonl")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_an_error(tmp_path, name, content):
    with pytest.raises(DataError, match="no rows"):
        read_rows(write(tmp_path, name, content if name != "a.csv" else "text\n"))


def test_an_unknown_kind_of_file(tmp_path):
    with pytest.raises(DataError, match=r"unknown kind of file '\.xlsx'; known: \.jsonl"):
        read_rows(write(tmp_path, "a.xlsx", "a"))
