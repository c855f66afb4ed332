"""Many rows to examples, as `ChatFormat.encode` makes them of each, in less time. Knows no data sets and no models.

Most of a row's time goes into looking up tokens, and most of that into the way to the tokenizer and back. So rows are
written as text first, and the texts of many go to the tokenizer together, equal ones once; a fast tokenizer divides
them among the processor's cores. (Processes of our own were weighed against it: each takes seconds to begin, and a
script without a `__main__` guard would be run again by each.)
"""

from __future__ import annotations

from collections.abc import Sequence

from lorakit.data.chat import ChatFormat, Example
from lorakit.data.sources import Refusals, Row

_ROWS_AT_ONCE = 128  # enough texts for many cores, and few enough that what the tokenizer tells of each fits anywhere


def encode_rows(rows: Sequence[Row], chat_format: ChatFormat, complaint: str) -> list[list[Example]]:
    """The examples of each row: what `each_row(chat_format.encode, rows, complaint)` gives.

    Raises:
        DataError: at least one row was refused; lists them as `each_row` does.
    """
    refusals = Refusals()
    examples: list[list[Example]] = []
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        written = refusals.results(chat_format.write, rows[start : start + _ROWS_AT_ONCE])
        if refusals.problems:
            continue  # the rest is only asked what else is wrong
        texts = list(dict.fromkeys(text for row in written for text in row.texts()))
        known = dict(zip(texts, chat_format.ids_of_all(texts), strict=True))

        def ids(text: str, known: dict[str, list[int]] = known) -> list[int]:
            return known[text] if text in known else chat_format.ids(text)

        examples += [chat_format.examples(row, ids) for row in written]
    refusals.tell(complaint)
    return examples
