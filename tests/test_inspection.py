"""An adapter's spectrum as a table of layers by modules, and as a page."""

from html.parser import HTMLParser

import pytest
import torch

import lorakit
from adapter.models import CASES, randomise
from lorakit.inspection import figures, grid, write_page


def test_layers_go_down_and_modules_across():
    paths = ["model.embed_tokens"]
    paths += [f"model.layers.{i}.{m}" for i in (0, 2, 10) for m in ("self_attn.q_proj", "mlp.up_proj")]
    layout = grid(paths)
    assert layout.rows == ("0", "2", "10", "–")
    assert layout.columns == ("embed_tokens", "q_proj", "up_proj")
    assert layout.paths[2, 1] == "model.layers.10.self_attn.q_proj"
    assert set(layout.paths.values()) == set(paths)


def test_two_stacks_and_equal_ends_are_told_apart():
    layout = grid(["encoder.layer.0.a.out", "encoder.layer.0.b.out", "decoder.layer.0.a.out", "blocks.3"])
    assert layout.rows == ("blocks.3", "decoder.layer.0", "encoder.layer.0")
    assert layout.columns == ("a.out", "b.out", "(itself)")


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.links = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_page_is_whole_and_needs_nothing_from_outside(case, tmp_path):
    handle = lorakit.attach(case.build(), lorakit.LoRAConfig(r=4, **case.what))
    randomise(handle)
    value = handle.extract()
    text = write_page(tmp_path / "a.html", "<script>alert(1)</script>", value, value.spectrum()).read_text("utf-8")
    page = Page(text)
    assert not page.open
    assert not page.links
    assert "script" not in page.seen
    assert page.seen.count("rect") == 2 * len(value.factors)  # two heat maps
    assert all(path in text for path in value.factors)
    assert "nan" not in text


def test_a_fresh_adapter_has_a_page_too(tmp_path):
    value = lorakit.attach(CASES["llama"].build(), lorakit.LoRAConfig(r=2)).extract()
    assert "No update." in write_page(tmp_path / "a.html", "a", value, value.spectrum()).read_text("utf-8")


def test_all_figures():
    handle = lorakit.attach(CASES["mlp"].build(), lorakit.LoRAConfig(r=2))
    randomise(handle)
    value = handle.extract()
    told = figures(value, value.spectrum())
    assert told["layers"] == 2
    assert told["spectrum"]["layers"]["first"]["singular_values"] == pytest.approx(
        torch.linalg.svdvals(value.delta("first").double())[:2].tolist(), rel=1e-5
    )
