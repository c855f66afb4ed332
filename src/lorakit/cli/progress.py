"""How a run looks in a terminal: a few lines, and one that moves; elsewhere, a plain line now and then."""

from __future__ import annotations

import time
from collections import deque
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from lorakit.report import count, duration, size
from lorakit.training.events import (
    Checkpointed,
    DataReady,
    Evaluated,
    Event,
    ModelReady,
    Phase,
    Planned,
    Resumed,
    StepDone,
    TrunkKept,
)

_PLAIN_SECONDS = 30.0  # between plain lines, besides those at evaluations
_RECENT = 10  # steps over which loss and speed are averaged for the eye


class TrainingDisplay:
    """Shows the events of a run on a console; give it to `train` as `on_event`.

    Example: ``with TrainingDisplay(console) as display: train(config, display)``
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=None)
        self._steps: deque[StepDone] = deque(maxlen=_RECENT)
        self._valid: float | None = None
        self._start: tuple[float, int] | None = None  # when this process began its first step, and which it was
        self._last_plain = time.monotonic()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        match event:
            case Phase():
                status = f"{self._status()}  " if self._steps else ""
                self._progress.update(self._task, description=f"{status}{event.text} ...")
            case DataReady():
                for line in event.lines:
                    self._console.print(line)
            case Planned():
                self._console.print(plan_line(event))
            case ModelReady():
                self._console.print(model_line(event))
            case TrunkKept():
                self._console.print(trunk_line(event))
            case Resumed():
                self._say_resumed(event)
            case StepDone():
                self._take_step(event)
            case Evaluated():
                self._take_evaluation(event)
            case Checkpointed():
                pass  # every few minutes, and nothing to act on

    def _say_resumed(self, event: Resumed) -> None:
        for damage in event.damaged:
            self._console.print(f"resume a checkpoint is damaged and was passed over: {damage}")
        self._console.print(
            f"resume goes on after step {event.step:,}"
            if event.step
            else "resume no checkpoint yet; from the first step"
        )
        if event.changed:
            self._console.print(
                f"resume the machine differs from before ({'; '.join(event.changed)}): "
                "the result will equal the uninterrupted run's to rounding, not to the bit"
            )

    def _take_step(self, event: StepDone) -> None:
        if self._start is None:
            self._start = (time.monotonic() - event.seconds, event.step - 1)
        self._steps.append(event)
        self._progress.update(self._task, completed=event.step, total=event.total_steps, description=self._status())
        if time.monotonic() - self._last_plain > _PLAIN_SECONDS and not self._console.is_terminal:
            self._print_status()

    def _take_evaluation(self, event: Evaluated) -> None:
        self._valid = event.loss
        if self._steps:
            self._progress.update(self._task, description=self._status())
            self._print_status("  best so far" if event.best else "")
        else:
            of = "" if event.step else "  base model"
            if event.base is not None:
                of = f"  as the adapter begins; {event.base:.3f} base model"
            self._console.print(f"step {event.step:,}  valid {event.loss:.3f}{of}")

    def _print_status(self, note: str = "") -> None:
        self._console.print(self._status() + note)
        self._last_plain = time.monotonic()

    def _status(self) -> str:
        """`step 40/210  loss 1.31  valid 1.42  410 tok/s  14 min left`, of the newest steps and evaluation."""
        assert self._start is not None
        last, (begun, before_first) = self._steps[-1], self._start
        left = (time.monotonic() - begun) / (last.step - before_first) * (last.total_steps - last.step)
        speed = sum(step.tokens for step in self._steps) / sum(step.seconds for step in self._steps)
        loss = sum(step.loss for step in self._steps) / len(self._steps)
        valid = "" if self._valid is None else f"  valid {self._valid:.3f}"
        where = f"step {last.step:,}/{last.total_steps:,}"
        return f"{where}  loss {loss:.3f}{valid}  {speed:,.0f} tok/s  {duration(left)} left"


def plan_line(event: Planned) -> str:
    """`plan   peak 2.4 of 23 GB`, and what was chosen so that it fits."""
    if event.peak is None:
        return f"plan   peak memory unknown: {event.note}"
    of = "" if event.limit is None else f" of {size(event.limit)}"
    return f"plan   peak {size(event.peak)}{of}" + (f"; {event.note}" if event.note else "")


def trunk_line(event: TrunkKept) -> str:
    """`trunk  20 layers run once; 248,439 tokens of what they put out, 286 MB, are kept in memory`."""
    return (
        f"trunk  {event.layers} layers run once; {event.tokens:,} tokens of what they put out, {size(event.nbytes)}, "
        f"are kept in {event.where}"
    )


def model_line(event: ModelReady) -> str:
    """`model  494M parameters in nf4, bf16 on cpu; 168 layers adapted, r=16: 8.8M trained (1.8%)`."""
    if not event.layers and not event.virtual_tokens:
        return f"model  {count(event.parameters)} parameters, {event.dtype} on {event.device}; all of them trained"
    ranks = "-".join(str(r) for r in dict.fromkeys((event.ranks[0], event.ranks[-1]))) if event.ranks else "none"
    held = {"none": "", "blocks": " in the file's blocks"}.get(event.storage, f" in {event.storage}")
    products = "" if event.products == "exact" else f", {event.products} in steps"
    what = [f"{event.layers} layers adapted, r={ranks}"] if event.layers else []
    what += [f"{event.virtual_tokens} virtual tokens"] if event.virtual_tokens else []
    return (
        f"model  {count(event.parameters)} parameters{held}, {event.dtype}{products} on {event.device}; "
        f"{', '.join(what)}: {count(event.trained)} trained ({event.trained / event.parameters:.1%})"
    )
