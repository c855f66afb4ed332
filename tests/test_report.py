"""The report is one page that needs nothing else, whatever is in the data."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from lorakit.errors import FileError
from lorakit.report import Curve, chart, count, duration, size, smoothed, thinned, ticks, write_report

RESULT = {
    "lorakit_version": "0.1.0",
    "step": 180,
    "total_steps": 180,
    "interrupted": False,
    "initial_loss": 2.197,
    "best_loss": 1.2219,
    "best_step": 162,
    "parameters": 134515008,
    "trained_parameters": 4884480,
    "adapter_bytes": 19560000,
    "model_bytes": None,
    "peak_memory": 2_900_000_000,
    "seconds": 367.2,
    "tokens": 198000,
    "device": "cpu",
    "dtype": "bf16",
    "storage": "nf4",
}


def run_folder(folder, result=RESULT, steps=180):
    rows = [{"step": 0, "eval_loss": 2.197}]
    for step in range(1, steps + 1):
        rows.append(
            {"step": step, "loss": 1 + 1 / step, "lr": 1e-3 * step, "grad_norm": 1.0, "tokens": 9, "seconds": 1.0}
        )
        if step % 18 == 0:
            rows.append({"step": step, "eval_loss": 1.2 + 1 / step})
    (folder / "run.yaml").write_text(
        "model: smollm2\ndata: train.jsonl\nlora:\n  r: 16\nlearning_rate: 0.001\nvalidation: null\n"
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "data.json").write_text(json.dumps({"training": {"rows": 2853}, "validation": {"rows": 150}}))
    sample = {
        "origin": "valid.jsonl:3", "prompt": "name[Eagle] <script>alert(1)</script>", "references": ["Cheap & French."],
        "before": "", "after": "The <b>Eagle</b>.",
    }  # fmt: skip
    (folder / "samples.json").write_text(json.dumps([sample]))
    (folder / "result.json").write_text(json.dumps(result))
    return folder


class Reader(HTMLParser):
    """Tags, their attributes, and the text between them."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "line", "circle", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def page(tmp_path):
    path = write_report(run_folder(tmp_path))
    assert path == tmp_path / "report.html"
    return Reader(path.read_text(encoding="utf-8"))


def test_needs_no_script_and_nothing_from_outside(page):
    names = {name for name, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "base"}
    assert not [attrs for _, attrs in page.tags if {"src", "href", "onload", "onclick"} & set(attrs)]
    style = "".join(page.text)
    assert "url(" not in style
    assert "@import" not in style
    assert page.open == []  # every element is closed


def test_fits_a_phone_and_both_colour_schemes(page):
    metas = [attrs for name, attrs in page.tags if name == "meta"]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in metas
    assert "prefers-color-scheme: dark" in "".join(page.text)


def test_shows_what_matters(page):
    text = " ".join("".join(page.text).split())
    for expected in (
        "2.197 → 1.222",
        "step 162 of 180",
        "3.63% of 135M",
        "19.6 MB",
        "539 tokens/s",
        "6 min 7 s",
        "lora r",
        "2,853",
    ):
        assert expected in text, expected
    assert "no better than the base" not in text


def test_text_from_the_data_is_text(page):
    assert "name[Eagle] <script>alert(1)</script>" in page.text
    assert "The <b>Eagle</b>." in page.text
    assert "(nothing)" in page.text


def test_drawings_are_described_for_screen_readers(page):
    drawings = [attrs for name, attrs in page.tags if name == "svg"]
    assert len(drawings) == 2
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    for attrs in drawings:
        assert attrs["role"] == "img"
        assert set(attrs["aria-labelledby"].split()) <= ids


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"best_loss": 2.3}, "no better than the base"),
        (
            {"interrupted": True, "step": 40, "best_loss": None, "best_step": None, "adapter_bytes": None},
            "lorakit train --resume",
        ),
    ],
)
def test_says_what_is_not_as_hoped(tmp_path, changes, expected):
    text = write_report(run_folder(tmp_path, {**RESULT, **changes})).read_text(encoding="utf-8")
    assert expected in text


def test_a_run_stopped_before_its_first_step(tmp_path):
    nothing = {
        "interrupted": True,
        "step": 0,
        "best_loss": None,
        "best_step": None,
        "adapter_bytes": None,
        "seconds": 0.0,
        "tokens": 0,
    }
    folder = run_folder(tmp_path, {**RESULT, **nothing}, steps=0)
    assert "No steps yet." in write_report(folder).read_text(encoding="utf-8")


def test_a_missing_file_is_named(tmp_path):
    folder = run_folder(tmp_path)
    (folder / "result.json").unlink()
    with pytest.raises(FileError, match=r"result\.json"):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_curves_stay_inside_the_drawing():
    points = [(step, 50 * math.exp(-step) + math.sin(step)) for step in range(2000)]
    drawing = chart("x", "t < u", "d & e", [Curve(points, "train")])
    root = ElementTree.fromstring(drawing)  # noqa: S314 - our own drawing
    line = next(element for element in root if element.tag == "polyline")
    placed = [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
    assert len(placed) == 2000
    assert all(54 <= x <= 406 and 10 <= y <= 190 for x, y in placed)
    assert root.find("title").text == "t < u"


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (1.22, 2.19), (0.0, 1e-3), (-3.0, 5000.0), (2.0, 2.0), (0.0, 0.0)]
)
def test_ticks_enclose_and_are_round(low, high):
    found = ticks(low, high, 5)
    assert found[0] <= low + 1e-9
    assert found[-1] >= high - 1e-9
    assert 3 <= len(found) <= 12
    steps = {f"{b - a:.1e}"[0] for a, b in pairwise(found)}
    assert steps <= {"1", "2", "5"}


def test_thinning_and_smoothing_keep_ends_and_means():
    points = [(float(i), float(i % 7)) for i in range(5001)]
    thin = thinned(points)
    assert len(thin) <= 402
    assert (thin[0], thin[-1]) == (points[0], points[-1])
    assert smoothed([(i, 2.0) for i in range(100)]) == [(i, 2.0) for i in range(100)]
    assert thinned(points[:10]) == points[:10]


def test_words_for_numbers():
    assert [count(n) for n in (950, 921_600, 4_884_480, 134_515_008, 7_000_000_000)] == [
        "950",
        "922K",
        "4.88M",
        "135M",
        "7B",
    ]
    assert [size(n) for n in (12, 11_400_000, 2_500_000_000)] == ["12 B", "11.4 MB", "2.5 GB"]
    assert [duration(s) for s in (0.4, 42, 367, 7300)] == ["0 s", "42 s", "6 min 7 s", "2 h 1 min"]
    assert not re.search(r"e\+", count(999_900_000))
