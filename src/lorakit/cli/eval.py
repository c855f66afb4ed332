"""`lorakit eval`: measure a model and its adapters on held-out rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from lorakit.cli.common import console, emit, verb
from lorakit.cli.loading import model_options, unpack_option
from lorakit.errors import ConfigError

if TYPE_CHECKING:
    from lorakit.evaluation import Evaluation

_SHARES = {"exact_match", "rouge_l", "json_valid"}


@verb("eval")
@click.argument("data")
@model_options
@unpack_option
@click.option("--adapter", "adapters", multiple=True, metavar="FOLDER", help="Adapter to measure; may be given again.")
@click.option("--base", is_flag=True, help="Measure the model without adapter too.")
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    default=("loss",),
    show_default=True,
    help="loss, exact_match, bleu, rouge_l, json_valid; several with commas, or given again.",
)
@click.option("--limit", type=int, help="Use only the first rows.")
@click.option("--max-new-tokens", type=int, default=256, show_default=True, help="Longest answer.")
@click.option("--answer-after", metavar="TEXT", help="exact_match compares what follows the last TEXT (GSM8K: '####').")
@click.option("--predictions", metavar="FILE.jsonl", help="Write every answer here, one JSON object a line.")
@click.option("--max-length", type=int, default=1024, show_default=True, help="Longest row for the loss, in tokens.")
@click.option(
    "--batch-size",
    "--per_device_eval_batch_size",
    type=int,
    default=32,
    show_default=True,
    help="Rows generated at once.",
)
@click.option("--split", default="test", show_default=True, help="Split of a Hub data set.")
def command(
    data: str, model: str | None, adapters: Sequence[str], predictions: str | None, as_json: bool, **settings: Any
) -> None:
    """Measure a model on DATA (as for train), and each adapter on it.

    Without --adapter the model itself is measured; with adapters each of them, and with --base the model too. Without
    --model the base is the one the adapters name.
    """
    from rich.progress import Progress

    from lorakit.evaluation import GENERATION_METRICS, evaluate
    from lorakit.files import JsonLines

    settings["metrics"] = [name.strip() for value in settings["metrics"] for name in value.split(",")]
    if predictions is not None and set(settings["metrics"]) <= {"loss"}:
        raise ConfigError(f"--predictions needs a metric that judges answers: {', '.join(GENERATION_METRICS)}")
    settings["base"] = settings["base"] or None  # a flag that is not given leaves the choice to evaluate
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        tasks: dict[str, Any] = {}

        def on_progress(subject: str, done: int, total: int) -> None:
            if subject not in tasks:
                tasks[subject] = progress.add_task(subject, total=total)
            progress.update(tasks[subject], completed=done)

        results = evaluate(data=data, model=model, adapters=adapters, on_progress=on_progress, **settings)
    for line in result_lines(results, settings["max_new_tokens"]):
        console.print(line)
    if predictions is not None:
        JsonLines(predictions).keep(list(_prediction_rows(results)))
        console.print(f"answers in {predictions}")
    listed = [result.to_dict() for result in results]
    single = listed[0] if len(listed) == 1 else {}
    emit({"data": data, "model": model, **single, "results": listed}, as_json)


def result_lines(results: Sequence[Evaluation], max_new_tokens: int) -> Iterator[str]:
    """One line a subject, and what to know about it."""
    names = [result.adapter or "base" for result in results]
    width = max(map(len, names))
    for name, result in zip(names, results, strict=True):
        scores = "  ".join(f"{metric} {_shown(metric, value)}" for metric, value in result.scores.items())
        yield f"{name:<{width}}  {scores}  ({result.rows:,} rows, {result.seconds:.0f} s)"
        unfinished = sum(not prediction.finished for prediction in result.predictions)
        if unfinished:
            yield f"{'':<{width}}  {unfinished:,} answers did not end within --max-new-tokens {max_new_tokens:,}"
        if result.cut:
            yield f"{'':<{width}}  {result.cut:,} rows were cut to --max-length for the loss"


def _shown(metric: str, value: float) -> str:
    return f"{value:.1%}" if metric in _SHARES else f"{value:.1f}" if metric == "bleu" else f"{value:.4f}"


def _prediction_rows(results: Sequence[Evaluation]) -> Iterator[dict[str, Any]]:
    for result in results:
        for prediction in result.predictions:
            yield {
                "adapter": result.adapter,
                "row": prediction.row,
                "prediction": prediction.text,
                "references": list(prediction.references),
                "finished": prediction.finished,
            }
