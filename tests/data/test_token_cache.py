import dataclasses
import json
import os

import pytest
import torch

from chat_styles import CHATML, STYLES, chat, make_tokenizer, messages, row
from lorakit import files
from lorakit.data import token_cache
from lorakit.data.prepare import prepare, read_data
from lorakit.data.schema import parse_row
from lorakit.data.sources import each_row
from lorakit.data.token_cache import cached_examples, key_of
from lorakit.errors import DataError

ROWS = [
    row(1, messages=messages("Name a colour.", "Blue.")),
    row(2, messages=messages("Name a colour.", "Blue.", "And?", "four")),
    row(3, messages=messages("What is the answer? " * 40, "Blue.")),
    row(4, messages=messages("What?", "four " * 90)),
    row(5, prompt="What?", completion="Blue."),
    row(6, text="Name a colour. " * 30),
    row(7, messages=messages("a", "<think>b</think>Red.", "c", "Blue.")),
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every data set is worth keeping, in a cache of the test's own."""
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "WORTHWHILE", 0)
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def chat_format():
    return chat(STYLES["qwen3"](), max_length=64)


class Encoder:
    """Encodes rows and counts how often."""

    def __init__(self, chat_format):
        self.chat_format, self.calls = chat_format, 0

    def __call__(self, rows):
        def encode():
            self.calls += 1
            return each_row(self.chat_format.encode, rows, "")

        return cached_examples(rows, [parse_row(each) for each in rows], self.chat_format, encode)


def test_what_is_kept_is_what_was_made(chat_format, folder):
    encode, plain = Encoder(chat_format), each_row(chat_format.encode, ROWS, "")
    assert encode(ROWS) == plain
    assert encode(ROWS) == plain
    assert encode.calls == 1
    assert [path.suffix for path in folder.iterdir()] == [".safetensors"]
    kinds = [(type(e.ids[0]), type(e.trained[0]), type(e.prompt_cut), type(e.ends)) for (e, *_) in encode(ROWS)]
    assert kinds == [(int, bool, int, bool)] * len(ROWS)


@pytest.mark.parametrize("style", STYLES)
def test_whole_data_sets_are_equal_whichever_way(tmp_path, style):
    lines = [{"messages": messages(f"What {i}?", f"Blue {i}. " * (1 + i % 4)), "id": i} for i in range(40)]
    files.write_text(tmp_path / "a.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    chat_format = chat(STYLES[style](), max_length=56)
    plain = read_data(tmp_path / "a.jsonl", None, 0.2, 0, chat_format, token_cache=False)
    assert [[e] for e in plain.train.examples] == each_row(chat_format.encode, plain.train.rows, "")
    for _ in range(2):
        again = read_data(tmp_path / "a.jsonl", None, 0.2, 0, chat_format)
        assert dataclasses.replace(again, chat_format=None) == dataclasses.replace(plain, chat_format=None)
        assert again.lines() == plain.lines()


def test_the_file_of_rows_and_what_is_ignored_in_them_do_not_matter(chat_format):
    encode = Encoder(chat_format)
    encode(ROWS)
    moved = [
        dataclasses.replace(
            each, origin=dataclasses.replace(each.origin, file="other.csv"), fields={**each.fields, "id": object()}
        )
        for each in ROWS
    ]
    assert encode(moved) == each_row(chat_format.encode, moved, "")
    assert encode.calls == 1


@pytest.mark.parametrize(
    "rows",
    [
        ROWS[:-1],
        ROWS[::-1],
        [*ROWS[:-1], row(7, messages=messages("a", "<think>b</think>Red.", "c", "Blue!"))],
        [*ROWS[:4], row(5, prompt="What?B", completion="lue."), *ROWS[5:]],
    ],
)
def test_other_rows_are_other_tokens(chat_format, rows):
    encode = Encoder(chat_format)
    encode(ROWS)
    assert encode(rows) == each_row(chat_format.encode, rows, "")
    assert encode.calls == 2


def test_all_that_makes_tokens_is_in_the_key(monkeypatch):
    def make(**options):
        return make_tokenizer(**{"template": CHATML, "bos": "<|im_start|>", "eos": "<|im_end|>", **options})

    formats = [
        chat(make()),
        chat(make(), max_length=511),
        chat(make(), train_on="all"),
        chat(make(), chat_template="chatml-tools"),
        chat(make(), chat_template="none"),
        chat(make(eos="<|endoftext|>")),
        chat(make(bos="<s>")),
        chat(make(bos="<s>", adds_bos=True)),
        chat(make(pad="<|end|>")),
    ]
    larger = make()
    larger.add_tokens(["colour"])
    keys = [key_of(each) for each in [*formats, chat(larger)]]
    assert None not in keys
    assert len(set(keys)) == len(keys)
    assert key_of(chat(make())) == keys[0]
    for name in ("__version__", "_ENCODED_BY"):
        with monkeypatch.context() as patch:
            patch.setattr(token_cache, name, ("tokenizers",))
            assert key_of(formats[0]) != keys[0]


def test_a_limit_that_the_first_use_takes_away_is_not_in_the_key():
    limited = STYLES["chatml"]()
    limited.backend_tokenizer.enable_truncation(5)
    assert key_of(chat(limited)) == key_of(chat(STYLES["chatml"]()))


@pytest.mark.parametrize("call", ["strftime_now(format)", "[1, 2] | random", "lipsum()"])
def test_what_a_template_writes_anew_each_time_is_not_kept(call):
    assert key_of(chat(make_tokenizer("{% set format = '%Y' %}{{ " + call + " }}" + CHATML))) is None
    assert key_of(chat(make_tokenizer("{{ strftime_now('%d %b %Y') }}" + CHATML))) is not None  # a day that is fixed


def test_a_tokenizer_that_is_a_program_of_its_own_is_not_kept(folder):
    class Foreign(type(make_tokenizer())):
        pass

    tokenizer = STYLES["chatml"]()
    tokenizer.__class__ = Foreign
    encode = Encoder(chat(tokenizer))
    assert key_of(encode.chat_format) is None
    assert encode(ROWS) == encode(ROWS)
    assert encode.calls == 2
    assert not folder.exists()


# ---------------------------------------------------------------- damage


def test_damage_is_mended(chat_format, folder):
    encode, plain = Encoder(chat_format), each_row(chat_format.encode, ROWS, "")
    encode(ROWS)
    (path,) = folder.iterdir()
    sound = path.read_bytes()
    flipped = [
        sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :] for at in (0, 9, 200, len(sound) // 2, len(sound) - 1)
    ]
    for number, damaged in enumerate([b"", b"no tensors", sound[:-1], sound + b"\0", *flipped], 2):
        path.write_bytes(damaged)
        assert encode(ROWS) == plain
        assert encode.calls == number
        assert path.read_bytes() == sound


def test_a_file_under_another_name_is_not_taken(chat_format, folder):
    encode = Encoder(chat_format)
    encode(ROWS)
    (of_all,) = folder.iterdir()
    encode(ROWS[:3])
    (of_three,) = set(folder.iterdir()) - {of_all}
    of_three.replace(of_all)
    assert encode(ROWS) == each_row(chat_format.encode, ROWS, "")
    assert encode.calls == 3


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("examples", lambda tensor: tensor[:-1]),
        ("examples", lambda tensor: tensor * 0),
        ("examples", lambda tensor: tensor * 2),
        ("ids", lambda tensor: tensor - 10**6),
        ("ids", lambda tensor: tensor[:-1]),
        ("ids", lambda tensor: tensor.long()),
        ("ids", lambda tensor: tensor[None]),
        ("trained", lambda tensor: tensor[1:]),
        ("lengths", lambda tensor: tensor * 100),
        ("lengths", lambda tensor: tensor * -1),
        ("ends", lambda tensor: tensor[1:]),
        ("prompt_cut", lambda tensor: tensor - 1000),
        ("more", lambda tensor: torch.zeros(1)),
    ],
)
def test_what_does_not_add_up_is_not_taken_whatever_its_checksum(chat_format, folder, name, change):
    encode = Encoder(chat_format)
    encode(ROWS)
    (path,) = folder.iterdir()
    tensors, about = files.read_safetensors(path)
    tensors[name] = change(tensors.get(name)).clone()
    files.write_safetensors(path, tensors, {**about, "sha256": token_cache._checksum(tensors)})
    assert encode(ROWS) == each_row(chat_format.encode, ROWS, "")
    assert encode.calls == 2


# ---------------------------------------------------------------- what it leaves alone


def test_few_rows_are_not_kept(monkeypatch, chat_format, folder):
    monkeypatch.setattr(token_cache, "WORTHWHILE", 10**6)
    prepare(ROWS, chat_format)
    assert not folder.exists()


def test_bad_rows_are_told_and_nothing_is_kept(chat_format, folder):
    bad = [*ROWS, row(9, messages=messages("a", "b<|im_end|>c"))]
    told = []
    for kept in (False, True, True):
        with pytest.raises(DataError, match=r"data.jsonl:9: turn 2: the answer holds") as caught:
            prepare(bad, chat_format, token_cache=kept)
        told.append(str(caught.value))
    assert len(set(told)) == 1
    assert not folder.exists()


def test_a_cache_that_cannot_be_written_changes_nothing(monkeypatch, tmp_path, chat_format):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "file" / "cache"))
    assert prepare(ROWS, chat_format) == prepare(ROWS, chat_format, token_cache=False)


def test_the_longest_unused_goes(monkeypatch, chat_format, folder):
    encode = Encoder(chat_format)
    for number in range(3):
        encode(ROWS[number:])
        for age, path in enumerate(sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns, reverse=True)):
            os.utime(path, (1000 - age, 1000 - age))
    encode(ROWS)  # the oldest, used again
    monkeypatch.setattr(token_cache, "MOST_BYTES", sum(path.stat().st_size for path in folder.iterdir()))
    encode(ROWS[3:])  # one more than there is room for
    assert encode.calls == 4
    encode(ROWS)
    encode(ROWS[2:])
    assert encode.calls == 4
    encode(ROWS[1:])
    assert encode.calls == 5


def test_more_than_there_is_room_for_is_not_kept(monkeypatch, chat_format, folder):
    monkeypatch.setattr(token_cache, "MOST_BYTES", 100)
    encode = Encoder(chat_format)
    assert encode(ROWS) == encode(ROWS)
    assert encode.calls == 2
    assert not folder.exists()
