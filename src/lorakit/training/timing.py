"""What a run's steps and evaluations take in time, measured on a few of them. Trains nothing."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lorakit.data.chat import Example
from lorakit.training.config import TrainConfig
from lorakit.training.gradients import Gradients
from lorakit.training.loop import Plan, accumulate, ready
from lorakit.training.objectives import mean_loss
from lorakit.training.optim import make_scaler
from lorakit.training.planned import RunPlan
from lorakit.training.trunk import kept_trunk, trunk_of


def timed(
    plan: RunPlan, config: TrainConfig, model: Any, train: Sequence[Example], valid: Sequence[Example], *, steps: int
) -> RunPlan:
    """The plan with the time that a few of the run's own steps and one evaluation take here; trains nothing.

    Args:
        plan: of the same run.
        config: of the run, resolved.
        model: the base, loaded, with the adapter attached and active.
        train: training rows.
        valid: validation rows.
        steps: how many, spread over the first epoch.
    """

    def tokens(step: Sequence[Sequence[int]]) -> int:
        return sum(config.prompt.in_rows + len(train[row].ids) for rows in step for row in rows)

    epoch = list(Plan.of(config, train).epoch())
    # the largest one first, uncounted: it touches all the memory that the others will have
    chosen = [max(epoch, key=tokens), *epoch[:: math.ceil(len(epoch) / steps)]]
    scaler = make_scaler(next(model.parameters()).dtype, next(model.parameters()).device)
    rates, before = [], 0.0
    longest = config.prompt.in_context + max(len(example.ids) for example in (*train, *valid))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with contextlib.ExitStack() as stack:
        share = stack.enter_context(ready(model, longest, config.frozen_products))
        if config.cache_trunk != "off":  # of the rows that will come here; all take as much longer as they have tokens
            used = [*(train[row] for step in chosen for rows in step for row in rows), *valid]
            start = time.perf_counter()
            stack.enter_context(kept_trunk(model, used, folder=None, micro_batch_tokens=config.evaluation_tokens))
            before = (time.perf_counter() - start) / trunk_of(model, used).tokens
            before *= trunk_of(model, (*train, *valid)).tokens
        gradients = stack.enter_context(Gradients(trained))
        mean_loss(model, valid, micro_batch_tokens=config.evaluation_tokens)
        for number, step in enumerate(chosen):
            start = time.perf_counter()
            with gradients.of_step():
                accumulate(model, train, step, scaler, config.seed, number, share=share)
            rates.append(tokens(step) / (time.perf_counter() - start))
        start = time.perf_counter()
        mean_loss(model, valid, micro_batch_tokens=config.evaluation_tokens)
        evaluation = time.perf_counter() - start
    rate = statistics.median(rates[1:])
    assert config.eval_steps is not None, "the caller resolves it"
    evaluations = 1 + math.ceil(plan.steps / config.eval_steps)
    return replace(plan, tokens_per_second=rate, seconds=before + plan.tokens / rate + evaluations * evaluation)
