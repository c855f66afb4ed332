import json

import pytest

from lorakit.data.schema import schema_of
from lorakit.demo.orders import canonical, make_orders, templates
from lorakit.errors import ConfigError

PARTS = ("train", "valid", "test")
FIRST = (
    (
        "Hey, I want to order 5 big margherita pizzas and two medium-sized lemonades.",
        "Send it over, the bell says Marco.",
    ),
    '{"items":[{"quantity":5,"item":"margherita pizza","size":"large"},'
    '{"quantity":2,"item":"lemonade","size":"medium"}],"delivery":true,"name":"Marco"}',
)


@pytest.fixture(scope="module")
def orders():
    return {part: make_orders(part, 600) for part in PARTS}


def test_the_same_seed_gives_the_same_orders_and_more_rows_only_add():
    assert make_orders("train", 50, seed=3) == make_orders("train", 80, seed=3)[:50]
    assert make_orders("train", 50, seed=3) != make_orders("train", 50, seed=4)


def test_an_order_of_seed_0_stays_what_it_was():
    """Figures in the log are about these rows: a change of the task is a change of the figures."""
    order = make_orders("test", 1)[0]
    assert order.sentences == FIRST[0]
    assert order.answer == FIRST[1]


def test_parts_share_no_sentence_and_no_order_twice(orders):
    sentences = {part: {text for order in orders[part] for text in order.sentences} for part in PARTS}
    for one, other in (("train", "valid"), ("train", "test"), ("valid", "test")):
        assert not sentences[one] & sentences[other]
    for part in PARTS:
        assert len({order.sentences for order in orders[part]}) == 600


def test_parts_share_no_template_and_there_are_hundreds():
    found = {part: {text for texts in templates(part) for text in texts} for part in PARTS}
    assert not found["train"] & found["test"]
    assert not found["train"] & found["valid"]
    assert not found["valid"] & found["test"]
    assert len(found["train"]) > 400
    assert len(found["test"]) > 50


def test_every_answer_is_canonical_json_of_the_same_few_fields(orders):
    for part in PARTS:
        for order in orders[part]:
            meaning = json.loads(order.answer)
            assert list(meaning) == [k for k in ("items", "delivery", "time", "name") if k in meaning]
            assert isinstance(meaning["delivery"], bool)
            assert 1 <= len(meaning["items"]) <= 3
            for item in meaning["items"]:
                assert list(item) == [k for k in ("quantity", "item", "size", "options") if k in item]
            if "time" in meaning:
                assert 12 <= int(meaning["time"][:2]) <= 21
            if "name" in meaning:
                assert meaning["name"] in " ".join(order.sentences)
            assert canonical(order.answer) is not None


def test_sentences_are_finished(orders):
    for order in orders["train"]:
        for sentence in order.sentences:
            assert "{" not in sentence
            assert sentence[0].isupper() or sentence[0].isdigit()
            assert sentence[-1] in ".?"
            assert "  " not in sentence


def test_every_kind_of_arrangement_is_in_every_part(orders):
    for part in PARTS:
        kinds = {(m["delivery"], "time" in m, "name" in m) for m in (json.loads(o.answer) for o in orders[part])}
        assert len(kinds) == 6


def test_rows_are_messages(orders):
    row = orders["train"][0].row()
    assert schema_of(row) == "messages"
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"b": 1, "a": [1, 2]}', '{"a":[1,2],"b":1}'),
        (' {"a":[1,2],"b":1}\n', '{"a":[1,2],"b":1}'),
        ('{"a": 1', None),
        ('{"a": 1} and so on', None),
        ('{"a": 1, "a": 1}', None),
        ('{"a": NaN}', None),
        ("", None),
    ],
)
def test_canonical(text, expected):
    assert canonical(text) == expected


def test_more_orders_than_there_are_is_an_error(monkeypatch):
    from lorakit.demo import orders

    only = orders.make_orders("test", 1)[0]
    monkeypatch.setattr(orders, "_order", lambda part, draw: only)
    with pytest.raises(ConfigError, match="no 5 different orders for test"):
        orders.make_orders("test", 5)
