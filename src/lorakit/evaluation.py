"""Measure a model and its adapters on held-out rows: loss, and metrics on what is generated. Writes no files.

Every subject (the base, each adapter) sees the same rows, through its own tokenizer and chat template: those saved
beside an adapter are what it was trained with.
"""

from __future__ import annotations

import contextlib
import functools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit import models
from lorakit.adapter.attach import attach, base_only
from lorakit.adapter.value import Adapter
from lorakit.data.chat import ChatFormat, Example
from lorakit.data.encoding import encode_rows
from lorakit.data.sources import Row, each_row, read_rows
from lorakit.errors import ConfigError, DataError, FileError, nearest
from lorakit.files import parse_json
from lorakit.generation import generate
from lorakit.training.objectives import mean_loss

# ---------------------------------------------------------------- metrics on text

References = Sequence[Sequence[str]]  # for each row, every acceptable answer


def exact_match(predictions: Sequence[str], references: References, answer_after: str | None = None) -> float:
    """Share of rows whose answer equals one of the references, white space at both ends aside.

    Args:
        predictions: what was generated.
        references: what is accepted.
        answer_after: compare only what follows the last occurrence of this marker ("####" in GSM8K); a prediction
            without it does not match.

    Returns:
        A number in [0, 1].

    Raises:
        DataError: a reference lacks the marker.
    """
    if answer_after is not None:
        lacking = [row for row, accepted in enumerate(references) if not all(answer_after in r for r in accepted)]
        if lacking:
            raise DataError(
                f"answer_after: {len(lacking)} of {len(references)} rows (first: number {lacking[0] + 1}) have a "
                f"reference without {answer_after!r}, so nothing could match it"
            )
    hits = 0
    for prediction, accepted in zip(predictions, references, strict=True):
        if answer_after is None:
            hits += prediction.strip() in {reference.strip() for reference in accepted}
        elif answer_after in prediction:
            answer = prediction.rpartition(answer_after)[2].strip()
            hits += answer in {reference.rpartition(answer_after)[2].strip() for reference in accepted}
    return hits / len(predictions)


def bleu(predictions: Sequence[str], references: References) -> float:
    """Corpus BLEU by sacrebleu: 13a tokens, lower-cased, all references (rows may have different numbers of them).

    Returns:
        A number in [0, 100].
    """
    import sacrebleu

    most = max(len(accepted) for accepted in references)
    # sacrebleu wants one list per reference number; None stands for "this row has no such reference" ("" would be one)
    columns: Any = [[accepted[k] if k < len(accepted) else None for accepted in references] for k in range(most)]
    hypotheses = [prediction.strip() for prediction in predictions]
    # force: do not remark on texts that end in " ."
    return float(sacrebleu.corpus_bleu(hypotheses, columns, lowercase=True, tokenize="13a", force=True).score)


class _Words:
    """Lower-cased runs of letters and digits: rouge-score's own tokens on English, but other alphabets stay."""

    def tokenize(self, text: str) -> list[str]:
        """Called by rouge-score."""
        return re.findall(r"[^\W_]+", text.lower())


def rouge_l(predictions: Sequence[str], references: References) -> float:
    """Mean over rows of ROUGE-L F1 (longest common subsequence of words, no stemming), the best of a row's references.

    Equals `rougeL` of the library `evaluate` on English. Text without spaces between words needs another metric.

    Returns:
        A number in [0, 1].
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    best = [
        max(scorer.score(reference, prediction)["rougeL"].fmeasure for reference in accepted)
        for prediction, accepted in zip(predictions, references, strict=True)
    ]
    return float(sum(best) / len(best))


def json_valid(predictions: Sequence[str], references: References) -> float:
    """Share of rows that are one JSON value, strictly (no NaN, no key twice, no text around); references do not matter.

    Returns:
        A number in [0, 1].
    """

    def valid(text: str) -> bool:
        try:
            parse_json(text.strip(), "prediction")
        except FileError:
            return False
        return True

    return sum(map(valid, predictions)) / len(predictions)


GENERATION_METRICS: dict[str, Callable[[Sequence[str], References], float]] = {
    "exact_match": exact_match,
    "bleu": bleu,
    "rouge_l": rouge_l,
    "json_valid": json_valid,
}
METRICS = ("loss", *GENERATION_METRICS)
_ALIASES = {"rouge": "rouge_l"}


# ---------------------------------------------------------------- evaluating

_UNMEASURABLE = "{bad} of {all} rows cannot be evaluated"


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a subject answered to one row."""

    row: str
    """Where the row stands: file and line."""

    text: str
    references: tuple[str, ...]
    finished: bool
    """Whether the answer ended by itself and not at `max_new_tokens`."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One subject's results."""

    adapter: str | None
    """Path or name of the adapter; None for the model without one."""

    rows: int
    scores: dict[str, float]
    """Metric -> value."""

    seconds: float
    tokens: int | None = None
    """Labelled tokens behind the loss."""

    cut: int | None = None
    """Rows cut to `max_length` for the loss."""

    predictions: tuple[Prediction, ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """What `lorakit eval --json` prints; `finished` is the share of answers that ended by themselves."""
        result: dict[str, Any] = {"adapter": self.adapter, "rows": self.rows, **self.scores}
        if self.tokens is not None:
            result |= {"tokens": self.tokens, "cut": self.cut}
        if self.predictions:
            result["finished"] = sum(p.finished for p in self.predictions) / len(self.predictions)
        return {**result, "seconds": round(self.seconds, 2)}


def evaluate(
    *,
    data: str | Path | Sequence[Row],
    model: str | tuple[Any, Any] | None = None,
    adapters: Sequence[str | Path | Adapter] = (),
    base: bool | None = None,
    as_is: bool = False,
    metrics: Sequence[str] = ("loss",),
    limit: int | None = None,
    max_new_tokens: int = 256,
    answer_after: str | None = None,
    max_length: int = 1024,
    chat_template: str = "auto",
    batch_size: int = 32,
    micro_batch_tokens: int = 4096,
    dtype: str = "auto",
    device: str = "auto",
    quantize: str = "auto",
    unpack_memory: int | None = None,
    split: str = "test",
    on_progress: Callable[[str, int, int], None] | None = None,
) -> list[Evaluation]:
    """Measure a model, without an adapter and with each of several.

    Args:
        data: rows, or where to read them (`data.read_rows`).
        model: what `load_model` takes, or what it gave (adapters are attached for the time of the call; one that has
            adapters already can only be measured without them, or `as_is`); None: the base that the adapters name.
        adapters: folders, or adapters in memory.
        base: whether to measure the model without adapter too; None: only if there are no adapters.
        as_is: let what is active in a model in memory be active while "the model without adapter" is measured.
        metrics: of `METRICS`. `loss` is the mean over labelled tokens, with training's mask; the others judge greedy
            generations.
        limit: take only the first rows.
        max_new_tokens: where generation ends at the latest.
        answer_after: see `exact_match`.
        max_length: longest row for the loss, as in training.
        chat_template: auto: the tokenizer's own, which beside an adapter is the one it was trained with.
        batch_size: rows generated at once.
        micro_batch_tokens: tokens at once for the loss.
        dtype: of the model, if it is loaded here.
        device: of the model, if it is loaded here.
        quantize: how the model is held, if it is loaded here (`models.storage_of`); auto: as it was for the adapters.
        unpack_memory: bytes for weights of a quantised base unpacked while answers are written (`generation.decoding`).
        split: of a Hub data set.
        on_progress: called with (adapter or "base", rows answered, rows in all).

    Returns:
        One result per subject: the base first, then the adapters in their order.

    Raises:
        ConfigError: an unknown metric or a bad setting.
        DataError: rows that cannot be used; lists the first ones.
        ModelError, AdapterFileError, AdapterMismatchError: as in `load_model` and `attach`.
    """
    metrics = _checked_metrics(metrics)
    if limit is not None and limit < 1:
        raise ConfigError(f"limit: must be at least 1 (got {limit})")
    if answer_after is not None and ("exact_match" not in metrics or not answer_after):
        raise ConfigError("answer_after: needs the metric exact_match and a marker of at least one character")
    judges = {metric: judge for metric, judge in GENERATION_METRICS.items() if metric in metrics}
    if answer_after is not None:
        judges["exact_match"] = functools.partial(exact_match, answer_after=answer_after)
    names = _names(adapters)
    rows = read_rows(data, split) if isinstance(data, str | Path) else list(data)
    rows = rows[:limit]
    if not rows:
        raise DataError("no rows to evaluate")
    # adapters and rows are read before the model is: what is wrong with them is told at once
    if model is None:
        model = models.common_base([adapter for adapter in adapters if not isinstance(adapter, Adapter)])
    values = {
        name: adapter if isinstance(adapter, Adapter) else _read(adapter, model)
        for name, adapter in zip(names, adapters, strict=True)
    }
    if isinstance(model, str):
        storage = models.agreed_storage(list(values.values()), model, quantize)
        loaded, tokenizer = models.load_model(model, dtype, device, storage)
    else:
        loaded, tokenizer = model

    def measure(adapter: str | None, own_tokenizer: Any) -> Evaluation:
        start = time.perf_counter()
        subject = "base" if adapter is None else adapter
        report = None if on_progress is None else functools.partial(on_progress, subject)
        stop = models.stop_ids(loaded, own_tokenizer)
        chat_format = ChatFormat(own_tokenizer, stop, max_length, chat_template).for_rows(rows)
        scores: dict[str, float] = {}
        tokens = cut = None
        if "loss" in metrics:
            scores["loss"], tokens, cut = _loss(loaded, chat_format, rows, micro_batch_tokens)
        predictions: tuple[Prediction, ...] = ()
        if judges:
            predictions = _answers(loaded, chat_format, rows, max_new_tokens, batch_size, unpack_memory, report)
            texts, references = [p.text for p in predictions], [p.references for p in predictions]
            scores |= {metric: judge(texts, references) for metric, judge in judges.items()}
        return Evaluation(
            adapter=adapter,
            rows=len(rows),
            scores=scores,
            seconds=time.perf_counter() - start,
            tokens=tokens,
            cut=cut,
            predictions=predictions,
        )

    results = []
    if base or (base is None and not adapters):
        with contextlib.nullcontext() if as_is else base_only(loaded):
            results.append(measure(None, tokenizer))
    for name, adapter in zip(names, adapters, strict=True):
        folder = None if isinstance(adapter, Adapter) else adapter
        own_tokenizer = tokenizer if folder is None else models.tokenizer_beside(folder, loaded, tokenizer)
        with attached(loaded, values[name]):
            results.append(measure(name, own_tokenizer))
    return results


def _read(adapter: str | Path, model: str | tuple[Any, Any]) -> Adapter:
    return models.read_adapter(adapter, model) if isinstance(model, str) else Adapter.load(adapter, model=model[0])


@contextlib.contextmanager
def attached(model: Any, adapter: Adapter) -> Iterator[None]:
    """Within the block the model has the adapter."""
    handle = attach(model, adapter)
    try:
        yield
    finally:
        handle.detach()


def _loss(model: Any, chat_format: ChatFormat, rows: Sequence[Row], micro_batch_tokens: int) -> tuple[float, int, int]:
    """(mean loss, labelled tokens, rows that were cut)."""
    examples = encoded(chat_format, rows)
    cut = len({example.origin for example in examples if example.prompt_cut or example.answer_cut})
    return *mean_loss(model, examples, micro_batch_tokens=micro_batch_tokens), cut


def encoded(chat_format: ChatFormat, rows: Sequence[Row]) -> list[Example]:
    """All rows as the loss sees them.

    Raises:
        DataError: rows that cannot be used; lists the first ones.
    """
    return [example for examples in encode_rows(rows, chat_format, _UNMEASURABLE) for example in examples]


def _answers(
    model: Any,
    chat_format: ChatFormat,
    rows: Sequence[Row],
    max_new_tokens: int,
    batch_size: int,
    unpack_memory: int | None,
    on_progress: Callable[[int, int], None] | None,
) -> tuple[Prediction, ...]:
    prompts = each_row(chat_format.prompt, rows, _UNMEASURABLE)
    completions = generate(
        model,
        chat_format.tokenizer,
        [prompt.ids for prompt in prompts],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        stop_ids=chat_format.stop_ids,
        unpack_memory=unpack_memory,
        on_progress=on_progress,
    )
    return tuple(
        Prediction(
            row=str(prompt.origin),
            text=completion.text,
            references=prompt.references,
            finished=completion.finished,
        )
        for prompt, completion in zip(prompts, completions, strict=True)
    )


def _names(adapters: Sequence[str | Path | Adapter]) -> list[str]:
    names = [
        f"adapter {number}" if isinstance(adapter, Adapter) else str(adapter)
        for number, adapter in enumerate(adapters, 1)
    ]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"adapters: {', '.join(twice)} given twice")
    return names


def _checked_metrics(metrics: Sequence[str]) -> list[str]:
    """Names in `METRICS`, from what was asked for."""
    if isinstance(metrics, str) or not metrics:
        raise ConfigError(f"metrics: expected a list of {', '.join(METRICS)} (got {metrics!r})")
    known = [_ALIASES.get(metric, metric) for metric in metrics]
    for metric in known:
        if metric not in METRICS:
            guess = nearest(metric, METRICS)
            hint = f"did you mean {' or '.join(guess)}?" if guess else f"known: {', '.join(METRICS)}"
            raise ConfigError(f"metrics: unknown {metric!r}; {hint}")
    return known
