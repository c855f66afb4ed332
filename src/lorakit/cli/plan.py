"""`lorakit plan`: what a run will take, before it is run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from lorakit.cli.common import FILE_VALUES, Memory, config_options, console, emit, verb
from lorakit.errors import ConfigError
from lorakit.training.config import TrainConfig

if TYPE_CHECKING:
    from lorakit.training.planned import RunPlan, Setting, Suggestion

_NO_DATA = "no data"


def data_or_length(function: Callable[..., None]) -> Callable[..., None]:
    """Without DATA, a plan is of rows of --length tokens.

    Raises:
        ConfigError: neither is given, or both.
    """

    @functools.wraps(function)
    def with_data(*args: Any, **values: Any) -> None:
        given = values.get("data") is not None or values.get("data_flag") is not None
        if values["length"] is not None:
            if given:
                raise ConfigError(
                    "--length is for a plan without DATA: rows of that many tokens; leave one of them out"
                )
            values["data"] = _NO_DATA
        elif not given and FILE_VALUES not in click.get_current_context().meta:
            raise ConfigError("give DATA, or --length N for rows of N tokens each")
        function(*args, **values)

    return with_data


@verb("plan")
@click.option("--memory", type=Memory(), help="Memory there is, e.g. 16GB; by default what is available here.")
@click.option("--length", type=click.IntRange(2), help="Without DATA: rows of this many tokens, all of them trained.")
@click.option(
    "--steps_timed",
    type=click.IntRange(0),
    default=4,
    show_default=True,
    help="Steps that are run to measure the time (nothing is trained); 0: none. Only with DATA.",
)
@data_or_length
@config_options(TrainConfig, positional={"data"})
def command(config: TrainConfig, memory: int | None, length: int | None, steps_timed: int, as_json: bool) -> None:
    """Say what a run will take, before it is run: memory, time, size of the adapter; and settings that fit.

    Takes the flags of lorakit train. The model needs no weights here: a folder with its config.json will do, or a Hub
    id of a model larger than this machine.
    """
    from lorakit.training.plan_run import plan_run

    with console.status("planning"):
        plan = plan_run(config, memory=memory, length=length, steps_timed=0 if length else steps_timed)
    for line in lines(plan):
        console.print(line)
    emit(plan.to_dict(), as_json)


def lines(plan: RunPlan) -> list[str]:
    """A plan for people."""
    from lorakit.report import duration, size

    memory = plan.memory
    told = [
        f"model   {plan.parameters:,} parameters, {size(memory.weights)}; {plan.trained:,} trained "
        f"({plan.trained / plan.parameters:.2%}); adapter file {size(plan.adapter_bytes)}",
        f"steps   {plan.steps:,}, {plan.tokens:,} tokens, of which {plan.computed:.0%} go through the model",
        f"memory  {size(memory.peak)}: process {size(memory.process)}, held {size(memory.held)}, weights "
        f"{size(memory.weights)}, adapter and optimiser {size(memory.adapter)}, "
        f"{f'trunk {size(memory.trunk)}, ' if memory.trunk else ''}step {size(memory.training)} "
        f"(activations {size(memory.activations)}, logits {size(memory.logits)}), or evaluation "
        f"{size(memory.evaluation)}",
    ]
    if plan.tokens_per_second is not None and plan.seconds is not None:
        told.append(
            f"time    {duration(plan.seconds)}, {plan.tokens_per_second:,.0f} tokens/s (measured on steps of the run)"
        )
    if plan.limit is not None:
        as_chosen = plan.chosen != plan.asked  # what is told above is of what was chosen
        told.append(
            f"limit   {size(plan.limit)}: {'fits' if plan.fits else 'does not fit'}"
            + (f" as chosen here; as asked it takes {size(plan.asked.peak)} and does not" if as_chosen else "")
        )
        told += [f"  fits  {_setting(each)}" for each in plan.fitting] or [
            "  nothing that leaves the result as it is fits"
        ]
        told += [f"  else  {_suggestion(each)}" for each in plan.suggestions]
        if not plan.fitting and not plan.suggestions:
            told.append("  nor with a base in fewer bits, bf16 or shorter rows: a smaller model, or another machine")
    return told


def _setting(setting: Setting) -> str:
    """Cost first, then what a step is divided into, and the flags for it."""
    from lorakit.report import size

    at_once = "1 row" if setting.rows == 1 else f"{setting.rows:,} rows"
    return (
        f"{size(setting.peak)}, {setting.time:.2f} times as long, {at_once} x {setting.micro_batches:,} a step: "
        f"--micro-batch-tokens {setting.micro_batch_tokens} "
        f"--gradient-checkpointing {'on' if setting.gradient_checkpointing else 'off'}"
    )


def _suggestion(suggestion: Suggestion) -> str:
    """Setting and flag, and what follows from it."""
    effects = ["the same numbers in fewer bits" if suggestion.same_result else "another result"]
    if suggestion.flag == "quantize":
        effects.append("unpacking takes more time than is counted here")
    if suggestion.rows_cut:
        effects.append(f"{suggestion.rows_cut:,} rows are cut")
    flag = f"--{suggestion.flag.replace('_', '-')} {suggestion.value}"
    return f"{_setting(suggestion.setting)} {flag}: {', '.join(effects)}"
