"""Runs that begin from the weight or from data, with one rate for A and another for B, or with A as it began."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from lorakit.adapter.attach import attach
from lorakit.adapter.value import Adapter
from lorakit.core import initializers
from lorakit.errors import ConfigError, RunError
from lorakit.models import load_model
from lorakit.training.config import TrainConfig
from lorakit.training.events import Evaluated, Phase, StepDone
from lorakit.training.objectives import mean_loss
from lorakit.training.optim import make_optimizer, set_learning_rate
from lorakit.training.plan_run import plan_run
from lorakit.training.planning import Planner
from lorakit.training.run import read, train
from tiny_runs import assert_same_run, configured, metrics

LORA = {"r": 4, "alpha": 8.0, "dropout": 0.1}
VARIANTS = {
    "olora": {"lora": {**LORA, "init": "olora"}},
    "pissa": {"lora": {**LORA, "init": "pissa"}},
    "dora": {"lora": {**LORA, "delta": "dora"}},
    "pissa, bf16, dora": {"lora": {**LORA, "init": "pissa_niter_4", "delta": "dora"}, "dtype": "bf16"},
    "eva": {"lora": {**LORA, "init": "eva", "scaling": "rslora"}},
    "lora_ga": {"lora": {**LORA, "init": "lora_ga"}, "init_steps": 2},
    "lora_fa": {"lora": {**LORA, "lora_fa": True}},
    "lora_fa, eva": {"lora": {**LORA, "lora_fa": True, "init": "eva"}},
    "loftq": {"lora": {**LORA, "init": "loftq"}, "quantize": "nf4"},
    "loraplus": {"loraplus_lr_ratio": 4.0},
}


def stop_at(step):
    def stop(event):
        if isinstance(event, StepDone) and event.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return stop


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_learns_and_a_resumed_run_is_the_uninterrupted_one(settings, tmp_path, variant):
    changed = {**settings, **VARIANTS[variant]}
    run = train(configured(changed, tmp_path / "straight"))
    assert run.best_loss < run.initial_loss
    train(configured(changed, tmp_path / "broken"), stop_at(5))
    train(configured(changed, tmp_path / "broken", resume=True))
    assert_same_run(tmp_path / "straight", tmp_path / "broken")
    best = Adapter.load(tmp_path / "straight" / "best")
    model, _ = load_model(settings["model"], run.dtype, "cpu", run.storage)
    attach(model, best)
    config = configured(changed, tmp_path / "x")
    loss, _ = mean_loss(model, read(config).valid.examples, micro_batch_tokens=config.micro_batch_tokens)
    assert loss == pytest.approx(run.best_loss, rel=1e-2 if run.dtype == "bf16" else 1e-5)  # stacks are rounded anew


def test_a_start_that_comes_out_otherwise_does_not_change_a_resumed_run(settings, tmp_path, monkeypatch):
    """Another machine's decomposition has other signs: the checkpoint's start counts."""
    changed = {**settings, "lora": {**LORA, "init": "pissa"}}
    train(configured(changed, tmp_path / "straight"))
    train(configured(changed, tmp_path / "broken"), stop_at(5))
    own = initializers.pissa
    monkeypatch.setattr(initializers, "pissa", lambda *args: tuple(-factor for factor in own(*args)))
    train(configured(changed, tmp_path / "broken", resume=True))
    assert_same_run(tmp_path / "straight", tmp_path / "broken")
    fixed = load_file(next((tmp_path / "straight").glob("checkpoints/step-*/fixed.safetensors")))
    assert {name.rsplit(".", 1)[1] for name in fixed} == {"A0", "B0"}


def test_data_are_looked_at_once(settings, tmp_path):
    changed, told = {**settings, "lora": {**LORA, "init": "eva"}}, []
    train(configured(changed, tmp_path / "run"), stop_at(3))
    train(configured(changed, tmp_path / "run", resume=True), told.append)
    assert not [event for event in told if isinstance(event, Phase) and "init eva" in str(event)]


def test_resuming_with_another_start_is_refused(settings, tmp_path):
    train(configured({**settings, "lora": {**LORA, "init": "olora"}}, tmp_path / "run"), stop_at(3))
    with pytest.raises(RunError, match="lora"):
        train(configured({**settings, "lora": {**LORA, "init": "pissa"}}, tmp_path / "run", resume=True))


def test_the_plan_counts_what_is_held_beside_what_is_trained(settings, tmp_path):
    def plan(name, **lora):
        config = configured({**settings, "lora": {**LORA, **lora}}, tmp_path / name)
        planner = Planner(config.replace(dtype="fp32", device="cpu"), read(config).train.examples)
        return planner.plan(None)

    plain, pissa, fa = plan("a"), plan("b", init="pissa"), plan("c", lora_fa=True)
    assert pissa.trained == plain.trained
    assert pissa.memory.adapter == plain.memory.adapter + 4 * plain.trained
    assert pissa.adapter_bytes == 2 * plain.adapter_bytes
    assert fa.trained < plain.trained
    assert fa.adapter_bytes == plain.adapter_bytes


# ---------------------------------------------------------------- rates


def test_loraplus_gives_B_and_vectors_a_multiple_of_the_rate(settings, tmp_path):
    lora = {"r": 2, "delta": "dora", "target_modules": ["embed_tokens", "q_proj"]}
    config = configured({**settings, "lora": lora}, tmp_path / "run", loraplus_lr_ratio=16)
    handle = attach(load_model(settings["model"], "fp32", "cpu")[0], config.lora)
    tensors = handle.trainable_tensors()
    optimizer = make_optimizer(config, tensors, handle.output_side())
    set_learning_rate(optimizer, 1e-3)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(tensors)
    for name, tensor in tensors.items():
        faster = "q_proj" in name and not name.endswith(".A")
        assert rates[id(tensor)] == pytest.approx(16e-3 if faster else 1e-3), name


def test_loraplus_is_in_the_metrics_and_steps_are_adamws(settings, tmp_path):
    train(configured(settings, tmp_path / "run", loraplus_lr_ratio=4, max_steps=3, samples=0))
    steps = [row for row in metrics(tmp_path / "run") if "loss" in row]
    assert all(row["lr_B"] == pytest.approx(4 * row["lr"]) for row in steps)
    A, B = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2, 2))
    config = configured(settings, tmp_path / "x", loraplus_lr_ratio=4, adam_epsilon=1e-30)
    optimizer = make_optimizer(config, {"x.A": A, "x.B": B}, {"x.B"})
    A.grad, B.grad = torch.full((2, 2), 0.3), torch.full((2, 2), -7.0)
    set_learning_rate(optimizer, 0.01)
    optimizer.step()
    assert torch.allclose(A, torch.full((2, 2), 1 - 0.01))  # a first step of Adam is as long as the rate
    assert torch.allclose(B, torch.full((2, 2), 1 + 0.04))


def test_settings_that_do_not_go_together(settings, tmp_path):
    with pytest.raises(ConfigError, match="loraplus_lr_ratio: with lora_fa no A is trained"):
        configured({**settings, "lora": {**LORA, "lora_fa": True}}, tmp_path, loraplus_lr_ratio=4)
    with pytest.raises(ConfigError, match="loraplus_lr_ratio: must be positive"):
        configured(settings, tmp_path, loraplus_lr_ratio=0)
    with pytest.raises(ConfigError, match="factors of embeddings take learning_rate"):
        TrainConfig.from_dict({**settings, "loraplus_lr_embedding": 1e-6})


def test_run_yaml_has_the_start_and_the_file_any_tool_reads(settings, tmp_path):
    train(configured({**settings, "lora": {**LORA, "init": "pissa"}}, tmp_path / "run", max_steps=2, samples=0))
    assert TrainConfig.from_yaml(tmp_path / "run" / "run.yaml").lora.init == "pissa"
    config = json.loads((tmp_path / "run" / "best" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 16, True)


def test_a_start_that_is_an_update_is_told_apart_from_the_base(settings, tmp_path):
    told, of_plain = [], []
    changed = {**settings, "lora": {**LORA, "init": "loftq"}, "quantize": "nf4", "max_steps": 2}
    run = train(configured(changed, tmp_path / "run"), told.append)
    first = next(event for event in told if isinstance(event, Evaluated))
    assert metrics(tmp_path / "run")[0] == {"step": 0, "eval_loss": first.loss, "base_loss": first.base}
    assert run.initial_loss == first.base != first.loss
    assert run.storage == "nf4"
    model = load_model(settings["model"], "fp32", "cpu", "nf4")[0]
    config = configured(changed, tmp_path / "x")
    loss, _ = mean_loss(model, read(config).valid.examples, micro_batch_tokens=config.micro_batch_tokens)
    assert loss == pytest.approx(first.base, rel=1e-5)
    train(configured({**settings, "max_steps": 2}, tmp_path / "plain"), of_plain.append)
    assert next(event for event in of_plain if isinstance(event, Evaluated)).base is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"init": "loftq"}}, "this base is not quantised: load it with quantize nf4 or int8"),
        ({"loftq_original": "x"}, r"loftq_original: is for init loftq alone \(got init default\)"),
    ],
    ids=str,
)
def test_loftq_is_refused_before_anything_is_loaded(settings, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        train(configured({**settings, **changes}, tmp_path / "run"))
    assert not (tmp_path / "run" / "run.yaml").exists()


@pytest.mark.parametrize("init", ["eva", "lora_ga", "loftq"])
def test_plans_time_a_start_that_needs_more_than_the_model(settings, init):
    config = configured({**settings, "lora": {**LORA, "init": init}, "quantize": "nf4"}, "unused")
    assert plan_run(config, steps_timed=1).tokens_per_second > 0
