"""Orders in everyday language and the JSON they mean, made from a seed: the demo's task. Knows no model.

Every sentence template belongs to one of train, valid and test, so a test order shares no sentence, and no template of
one, with training. What the parts share is the menu, the names and the ways to say a number or a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any, Literal, NamedTuple, TypeVar

from lorakit.demo.phrases import ARRANGEMENTS, HOURS, MENU, NAMES, OPENINGS, ORDERS, QUANTITIES, SIZES
from lorakit.errors import ConfigError, FileError
from lorakit.files import parse_json

Part = Literal["train", "valid", "test"]

# Names the fields, so that the base model has its chance too.
SYSTEM = (
    "Turn the order into JSON: items (quantity, item, size, options), delivery, time, name. Leave out what is not said."
)

_Choice = TypeVar("_Choice")


class Order(NamedTuple):
    """One row of the task."""

    sentences: tuple[str, str]
    """What is ordered, and how it gets to the customer."""

    answer: str
    """The order as canonical JSON."""

    def row(self) -> dict[str, Any]:
        """As a line of a data file."""
        return {
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": " ".join(self.sentences)},
                {"role": "assistant", "content": self.answer},
            ]
        }


def make_orders(part: Part, count: int, seed: int = 0) -> list[Order]:
    """`count` different orders of a part; the first ones do not depend on `count`.

    Raises:
        ConfigError: there are not that many orders that differ.
    """
    orders: dict[tuple[str, str], Order] = {}
    attempt = 0
    while len(orders) < count:
        if attempt > 20 * count + 1000:
            raise ConfigError(f"rows: the demo's task has no {count:,} different orders for {part}; ask for fewer")
        order = _order(part, Random(f"{seed}/{part}/{attempt}"))  # noqa: S311 - orders are no secret
        orders.setdefault(order.sentences, order)
        attempt += 1
    return list(orders.values())


def canonical(text: str) -> str | None:
    """JSON in one spelling (keys sorted, no spaces), so that equal meaning is equal text; None if it is no JSON."""
    try:
        return _compact(parse_json(text.strip(), "answer"), sort_keys=True)
    except FileError:
        return None


def templates(part: Part) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The sentence templates of a part: (orders with each opening, arrangements)."""
    orders = tuple(opening + order for order in _of_part(ORDERS, part) for opening in OPENINGS)
    arrangements = tuple(text for texts in ARRANGEMENTS.values() for text in _of_part(texts, part))
    return orders, arrangements


def _of_part(texts: Sequence[_Choice], part: Part) -> Sequence[_Choice]:
    """Of each eight templates one is for test, one for validation, six for training."""
    place = {3: "test", 6: "valid"}
    return [text for number, text in enumerate(texts) if place.get(number % 8, "train") == part]


def _order(part: Part, draw: Random) -> Order:
    phrases, items = zip(*_items(draw), strict=True)
    listed = phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"
    first = draw.choice(OPENINGS) + draw.choice(_of_part(ORDERS, part)).format(items=listed)

    kinds = list(ARRANGEMENTS)
    delivery, timed, named = draw.choices(kinds, weights=[len(ARRANGEMENTS[kind]) for kind in kinds])[0]
    said_time, time = _time(draw)
    name = draw.choice(NAMES)
    second = draw.choice(_of_part(ARRANGEMENTS[delivery, timed, named], part)).format(time=said_time, name=name)

    meaning: dict[str, Any] = {"items": items, "delivery": delivery}
    if timed:
        meaning["time"] = time
    if named:
        meaning["name"] = name
    return Order((first[0].upper() + first[1:], second), _compact(meaning))


def _items(draw: Random) -> Iterator[tuple[str, dict[str, Any]]]:
    """(how it is said, what it means) of one to three things on the menu."""
    for item in draw.sample(list(MENU), draw.choices([1, 2, 3], weights=[5, 4, 1])[0]):
        one, several, sized, options = MENU[item]
        quantity = draw.choices(list(QUANTITIES), weights=[10, 6, 4, 3, 2, 2, 1])[0]
        meaning: dict[str, Any] = {"quantity": quantity, "item": item}
        words = [one if quantity == 1 else several]
        if sized and draw.random() < 0.6:
            size = draw.choice(list(SIZES))
            meaning["size"] = size
            words.insert(0, draw.choice(SIZES[size]))
        article = "an" if words[0][0] in "aeiou" else "a"
        words.insert(0, draw.choice((article, article, *QUANTITIES[1]) if quantity == 1 else QUANTITIES[quantity]))
        if draw.random() < 0.4:
            option = draw.choice(list(options))
            meaning["options"] = [option]
            words.append(draw.choice(options[option]))
        yield " ".join(words), meaning


def _time(draw: Random) -> tuple[str, str]:
    """(how it is said, as 24-hour clock); the place opens at noon, so every hour is one after it."""
    hour, minute = draw.choice(list(HOURS)), draw.choice((0, 0, 15, 30, 30, 45))
    clock = f"{hour if hour == 12 else hour + 12}:{minute:02}"
    after = HOURS.get(hour % 12 + 1)
    said = [clock, f"{hour}:{minute:02} pm"]
    if minute == 0:
        said += [f"{hour} pm", f"{HOURS[hour]} o'clock"]
    elif minute == 45:
        said += [f"quarter to {after}"] if after else []
    else:
        said += [f"{'quarter' if minute == 15 else 'half'} past {HOURS[hour]}"]
    return draw.choice(said), clock


def _compact(value: Any, sort_keys: bool = False) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, sort_keys=sort_keys)
