"""Schedules against transformers' own, AdamW's state through a round trip, clipping, fp16 scaling."""

import math

import pytest
import torch
import transformers

from lorakit.errors import RunError
from lorakit.training.config import TrainConfig
from lorakit.training.optim import (
    clip_gradients,
    default_learning_rate,
    learning_rate,
    make_optimizer,
    make_scaler,
    optimizer_tensors,
    restore_optimizer,
    set_learning_rate,
    warmup_steps,
)


def config(**changes):
    return TrainConfig(**{"model": "m", "data": "d", "output": "o", "learning_rate": 1e-3, **changes})


@pytest.mark.parametrize(("width", "rate"), [(16, 3e-3), (576, 2.1e-3), (1024, 1.2e-3), (4096, 2.9e-4)])
def test_the_rate_that_nobody_gave_falls_with_the_width(width, rate):
    assert default_learning_rate(width) == rate


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("total", "warmup"), [(20, 0.0), (20, 0.1), (179, 0.03), (7, 0.5)])
def test_schedule_is_that_of_transformers(schedule, total, warmup):
    settings = config(schedule=schedule, warmup=warmup, learning_rate=3e-4)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = transformers.get_scheduler(name, optimizer, math.ceil(total * warmup), total)
    for step in range(total):
        assert learning_rate(settings, step, total) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=0)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("total", [1, 2, 3])
def test_shortest_runs_have_a_step_at_the_full_rate(total):
    settings = config(warmup=0.9)
    assert warmup_steps(settings, total) == total - 1
    assert learning_rate(settings, total - 1, total) == settings.learning_rate


def gradients(step, tensors):
    for i, tensor in enumerate(tensors.values()):
        tensor.grad = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(100 * step + i))


def fresh():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.nn.Parameter(torch.randn(3, 4, generator=generator)) for name in ("a.A", "a.B", "unused.A")}


def advance(optimizer, tensors, steps):
    for step in steps:
        gradients(step, tensors)
        tensors["unused.A"].grad = None
        set_learning_rate(optimizer, 1e-2 / (step + 1))
        optimizer.step()


def test_restored_optimizer_goes_on_bit_for_bit():
    settings = config(weight_decay=0.1)
    straight = fresh()
    advance(make_optimizer(settings, straight), straight, range(6))

    first = fresh()
    optimizer = make_optimizer(settings, first)
    advance(optimizer, first, range(3))
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, first).items()}
    assert set(saved) == {f"{kind}.a.{factor}" for kind in ("exp_avg", "exp_avg_sq", "step") for factor in "AB"}
    second = {name: torch.nn.Parameter(tensor.detach().clone()) for name, tensor in first.items()}
    optimizer = make_optimizer(settings, second)
    restore_optimizer(optimizer, second, saved)
    advance(optimizer, second, range(3, 6))
    for name in straight:
        assert torch.equal(straight[name], second[name]), name


def test_state_of_other_tensors_is_refused():
    tensors = fresh()
    optimizer = make_optimizer(config(), tensors)
    advance(optimizer, tensors, range(1))
    saved = dict(optimizer_tensors(optimizer, tensors))
    with pytest.raises(RunError, match=r"another adapter.*step\.b\.A"):
        restore_optimizer(optimizer, tensors, {**saved, "step.b.A": torch.zeros(())})
    with pytest.raises(RunError, match=r"exp_avg of a\.A has shape \(2, 4\), the adapter \(3, 4\)"):
        restore_optimizer(optimizer, tensors, {**saved, "exp_avg.a.A": torch.zeros(2, 4)})


def test_clipping_is_global_and_reports_the_norm_before():
    tensors = fresh()
    gradients(0, tensors)
    norm = math.sqrt(sum(float((t.grad.double() ** 2).sum()) for t in tensors.values()))
    direction = {name: t.grad / norm for name, t in tensors.items()}
    assert clip_gradients(tensors, 0.0) == pytest.approx(norm, rel=1e-6)
    assert torch.equal(tensors["a.A"].grad, direction["a.A"] * norm) or torch.allclose(
        tensors["a.A"].grad, direction["a.A"] * norm
    )
    assert clip_gradients(tensors, 0.5) == pytest.approx(norm, rel=1e-6)
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor.grad, direction[name] * 0.5)


def test_non_finite_gradients_are_reported_and_left():
    tensors = fresh()
    gradients(0, tensors)
    tensors["a.B"].grad[1, 1] = math.nan
    kept = tensors["a.A"].grad.clone()
    assert math.isnan(clip_gradients(tensors, 1.0))
    assert torch.equal(tensors["a.A"].grad, kept)


def test_scaler_skips_an_overflowing_step_and_halves_its_scale():
    tensors = fresh()
    optimizer, scaler = make_optimizer(config(), tensors), make_scaler(torch.float16, torch.device("cpu"))
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    scaler.scale(sum(tensor.sum() for tensor in tensors.values()) * 1e36).backward()
    scaler.unscale_(optimizer)
    assert not math.isfinite(clip_gradients(tensors, 1.0))
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)
    assert scaler.state_dict()["scale"] == 2**15
    assert not make_scaler(torch.bfloat16, torch.device("cpu")).is_enabled()
