"""`lorakit train`: from a data file to an adapter in a run folder."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorakit.cli.common import FILE_VALUES, config_options, console, emit, verb
from lorakit.config import read_yaml
from lorakit.errors import ConfigError
from lorakit.training.config import TrainConfig

if TYPE_CHECKING:
    from lorakit.training.run import Run


def settings_of_the_run(function: Callable[..., None]) -> Callable[..., None]:
    """With `--resume` and no `--config`, settings come from the run folder's `run.yaml`; flags override them.

    Raises:
        ConfigError: no folder is given.
    """

    @functools.wraps(function)
    def with_settings(*args: Any, **values: Any) -> None:
        context = click.get_current_context()
        if values["resume"] and FILE_VALUES not in context.meta:
            if values["output"] is None:
                raise ConfigError("--resume needs --output FOLDER, the folder of the run to go on with")
            path = Path(values["output"]).expanduser() / "run.yaml"
            if path.exists():
                context.meta[FILE_VALUES] = (str(path), read_yaml(path))
        function(*args, **values)

    return with_settings


@verb("train")
@settings_of_the_run
@config_options(TrainConfig, positional={"data"})
def command(config: TrainConfig, as_json: bool) -> None:
    """Train an adapter on DATA (.jsonl, .json, .csv, .parquet, .txt, or a Hub data set id).

    The run goes into --output, or a new folder under runs/.

    Ctrl-C saves a checkpoint and says how to go on; a second one stops at once.
    """
    from lorakit.cli.progress import TrainingDisplay
    from lorakit.training.run import train

    with TrainingDisplay(console) as display:
        run = train(config, display)
    for line in closing_lines(run):
        console.print(line)
    emit(run.to_dict(), as_json)
    if run.interrupted:
        raise click.exceptions.Exit(128 + signal.SIGINT)


def closing_lines(run: Run) -> list[str]:
    """What came of it, and what to type next."""
    from lorakit.report import size

    if run.interrupted:
        return [
            f"saved  step {run.step:,} of {run.total_steps:,}",
            f"next   lorakit train --resume --output {run.directory}",
        ]
    lines = [
        f"done   best at step {run.best_step:,}, valid {run.best_loss:.3f} (base {run.initial_loss:.3f}); "
        + (f"adapter {size(run.adapter_bytes or 0)} in {run.adapter}" if run.adapter else "")
        + (f"model {size(run.model_bytes or 0)} in {run.model}" if run.model else "")
        + f"; report {run.report}"
    ]
    if run.best_loss is not None and run.initial_loss is not None and run.best_loss >= run.initial_loss:
        lines.append(
            "note   what was trained is no better than the base on the validation rows: "
            "lower --learning-rate, or look at the data with lorakit check"
        )
    if run.model:
        return [
            *lines,
            f"next   lorakit chat --model {run.model}    lorakit eval DATA --model {run.model}    "
            f"lorakit extract {run.model} --base BASE --rank 16 --output ADAPTER",
        ]
    verbs = [f"chat --adapter {run.adapter}", f"eval DATA --adapter {run.adapter}"]
    # a soft prompt alone is no part of weights
    verbs += [f"merge --adapter {run.adapter} --output MODEL"] if run.adapted_layers else []
    return [*lines, "next   " + "    ".join(f"lorakit {each}" for each in verbs)]
