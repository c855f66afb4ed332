"""The demo from end to end: make orders, train on them, ask base and adapter about orders neither has seen, compare."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorakit import models
from lorakit.demo.orders import Part, canonical, make_orders
from lorakit.errors import ConfigError
from lorakit.evaluation import Evaluation, evaluate
from lorakit.files import JsonLines, free_folder, write_json
from lorakit.training.config import TrainConfig
from lorakit.training.events import OnEvent, Phase
from lorakit.training.run import Run, train

BATCH_SIZE = 8
EVALUATIONS = 4  # of the validation rows, in the course of training
ANSWER_TOKENS = 112  # the longest answer of the task has fewer


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How many of the test orders were understood."""

    exact_match: float
    """Share of answers that are the very same JSON, whatever its spacing and order of keys."""

    json_valid: float
    """Share of answers that are JSON at all."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One test order, and what was made of it."""

    order: str
    expected: str
    base: str
    adapter: str


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What the demo came to. Without `base`, `adapter` and `comparisons` if training was interrupted."""

    run: Run
    rows: dict[Part, int]
    """Part of the task -> number of orders."""

    seconds: float
    base: Scores | None = None
    adapter: Scores | None = None
    comparisons: tuple[Comparison, ...] = ()
    """All test orders, in their order."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def demo(
    output: str | Path | None = None,
    rows: int = 480,
    test_rows: int = 48,
    model: str = "smollm2",
    seed: int = 0,
    on_event: OnEvent | None = None,
) -> Demo:
    """Train an adapter on made orders and compare it with its base on unseen ones.

    Args:
        output: run folder; None: runs/demo, or runs/demo-2 and so on where that is taken.
        rows: orders to train on, each once.
        test_rows: orders to compare on.
        model: base model, as `load_model` takes it.
        seed: determines the orders and the run.
        on_event: told what happens, as by `train`.

    Raises:
        ConfigError: too few or too many rows.
        ModelError: no model; says the command that helps.
    """
    if rows < 1 or test_rows < 1:
        raise ConfigError(f"rows and test rows: at least one of each is needed (got {rows} and {test_rows})")
    begun = time.monotonic()
    tell = on_event or (lambda event: None)
    models.resolve(model)  # before anything is written
    folder = Path(output) if output is not None else free_folder("runs/demo")
    sizes: dict[Part, int] = {"train": rows, "valid": max(4, rows // 30), "test": test_rows}
    files = {part: _write(folder / f"{part}.jsonl", part, count, seed) for part, count in sizes.items()}
    config = TrainConfig(
        model=model,
        data=str(files["train"]),
        validation=str(files["valid"]),
        output=str(folder),
        batch_size=BATCH_SIZE,
        eval_steps=max(1, rows // BATCH_SIZE // EVALUATIONS),
        samples=2,
        seed=seed,
    )
    run = train(config, on_event)
    if run.interrupted:
        result = Demo(run=run, rows=sizes, seconds=time.monotonic() - begun)
    else:
        base, adapter = _ask(model, str(run.adapter), files["test"], test_rows, tell)
        result = Demo(
            run=run,
            rows=sizes,
            base=_scores(base),
            adapter=_scores(adapter),
            comparisons=_comparisons(base, adapter, seed),
            seconds=time.monotonic() - begun,
        )
    write_json(folder / "demo.json", result.to_dict())
    return result


def _write(path: Path, part: Part, count: int, seed: int) -> Path:
    JsonLines(path).keep([order.row() for order in make_orders(part, count, seed)])
    return path


def _ask(model: str, adapter: str, data: Path, rows: int, tell: OnEvent) -> list[Evaluation]:
    """Base and adapter on the same unseen orders."""
    return evaluate(
        data=data,
        model=model,
        adapters=[adapter],
        base=True,
        metrics=["json_valid"],
        max_new_tokens=ANSWER_TOKENS,
        batch_size=rows,
        on_progress=lambda who, done, total: tell(Phase(f"{who} answers unseen orders, {done} of {total}")),
    )


def _scores(result: Evaluation) -> Scores:
    hits = sum(canonical(answer.text) == canonical(answer.references[0]) for answer in result.predictions)
    return Scores(exact_match=hits / result.rows, json_valid=result.scores["json_valid"])


def _comparisons(base: Evaluation, adapter: Evaluation, seed: int) -> tuple[Comparison, ...]:
    orders = make_orders("test", base.rows, seed)
    return tuple(
        Comparison(order=" ".join(order.sentences), expected=order.answer, base=before.text, adapter=after.text)
        for order, before, after in zip(orders, base.predictions, adapter.predictions, strict=True)
    )
