"""Runs whose frozen weights multiply in integers: near exact ones, resumed to the bit, refused where they cannot."""

import json

import pytest
import torch
from click.testing import CliRunner

from lorakit import LoRAConfig, attach, machine
from lorakit.cli import main
from lorakit.cli.progress import model_line
from lorakit.config import read_yaml
from lorakit.core.int8 import Int8Weight
from lorakit.errors import ConfigError, RunError
from lorakit.training.config import TrainConfig
from lorakit.training.events import ModelReady
from lorakit.training.loop import accumulate, ready
from lorakit.training.optim import make_scaler
from lorakit.training.planning import Planner
from lorakit.training.products import frozen_products, int8_layers, products_bytes, refuse_products
from lorakit.training.run import read, train
from tiny_models import tiny_llama
from tiny_runs import assert_same_run, configured, metrics

CPU = torch.device("cpu")


@pytest.fixture
def fast(monkeypatch):
    """A processor on which integers are faster than in any other dtype, which the tests' one may not be."""
    monkeypatch.setattr(machine, "int8_speedup", lambda dtype: 4.0)


class InterruptedRunError(Exception):
    pass


def stop_after(step):
    def stop(event):
        if getattr(event, "path", None) is not None and event.step == step:  # a checkpoint
            raise InterruptedRunError

    return stop


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("changes", [{}, {"dtype": "bf16"}, {"gradient_checkpointing": "on"}, {"lora": {"r": 4}}])
def test_a_run_stays_near_the_exact_one(settings, tmp_path, changes):
    """With and without dropout; the base is proved unchanged at the end of each."""
    events = []
    exact = train(configured(settings, tmp_path / "exact", **changes))
    near = train(configured(settings, tmp_path / "int8", frozen_products="int8", **changes), events.append)
    first, other = metrics(tmp_path / "exact"), metrics(tmp_path / "int8")
    assert other[0] == first[0]  # evaluations are exact, and so is that of the base
    assert other[1]["loss"] != first[1]["loss"]
    for row, of_exact in zip(other, first, strict=True):
        key = "loss" if "loss" in row else "eval_loss"
        assert row[key] == pytest.approx(of_exact[key], rel=0.03)
    assert near.best_loss < near.initial_loss - 0.1
    assert near.best_loss == pytest.approx(exact.best_loss, rel=0.02)
    assert "int8 in steps" in model_line(next(event for event in events if isinstance(event, ModelReady)))


@pytest.mark.usefixtures("fast")
def test_a_resumed_run_is_the_uninterrupted_one_and_the_other_kind_is_refused(settings, tmp_path):
    chosen = {**settings, "frozen_products": "int8"}
    train(configured(chosen, tmp_path / "straight"))
    with pytest.raises(InterruptedRunError):
        train(configured(chosen, tmp_path / "broken"), stop_after(6))
    with pytest.raises(RunError, match="frozen_products: 'int8' then, 'exact' now"):
        train(configured(settings, tmp_path / "broken", resume=True))
    train(configured(chosen, tmp_path / "broken", resume=True))
    assert_same_run(tmp_path / "straight", tmp_path / "broken")


@pytest.mark.usefixtures("fast")
def test_checkpointing_computes_the_same_again(settings):
    """The forward pass that is done twice must multiply in one way: where not, torch would not notice."""
    examples = read(configured(settings, "unused")).train.examples
    found = []
    for how in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model = tiny_llama()
        tensors = attach(model, LoRAConfig(r=4)).trainable_tensors()
        if how is not None:
            model.activation_checkpointing_enable(how)
            model.enable_input_require_grads()
        with ready(model, 100, "int8") as share:
            accumulate(model, examples, [[0, 1, 2]], make_scaler(torch.float32, CPU), 0, 0, share=share)
        found.append([tensor.grad for tensor in tensors.values()])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("fast")
def test_nothing_stays_on_the_model(llama):
    attach(llama, LoRAConfig(r=4))
    llama.eval()
    before = {name: dict(vars(module)) for name, module in llama.named_modules()}
    with pytest.raises(ZeroDivisionError), ready(llama, 100, "int8"):
        raise ZeroDivisionError
    assert {name: dict(vars(module)) for name, module in llama.named_modules()} == before


def test_the_output_head_stays_exact(llama):
    llama.lm_head.weight = torch.nn.Parameter(llama.lm_head.weight.detach().clone())
    attach(llama, LoRAConfig(r=4, target_modules=["q_proj", "down_proj", "lm_head"]))
    layers = llama.model.layers
    assert int8_layers(llama) == [
        module for layer in layers for module in (layer.self_attn.q_proj, layer.mlp.down_proj)
    ]


def test_its_memory_is_planned(settings):
    data = read(configured(settings, "unused"))
    planned = []
    for kind in ("exact", "int8"):
        config = configured(settings, "unused", frozen_products=kind)
        planned.append(Planner(config, data.train.examples, data.valid.examples))
    model = tiny_llama()
    attach(model, LoRAConfig(r=4))
    copies = [Int8Weight(layer.weight).rounded for layer in int8_layers(model)]
    taken = sum(tensor.numel() * tensor.element_size() for copy in copies for tensor in copy)
    assert planned[1].weights - planned[0].weights == products_bytes(model, "int8") == taken
    assert products_bytes(model, "exact") == 0


# ---------------------------------------------------------------- what it refuses


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_other_devices_are_refused_by_name(device):
    with pytest.raises(ConfigError, match=f"frozen_products: int8 is not for this run: .* not for {device}"):
        refuse_products("int8", torch.device(device), torch.float16)
    refuse_products("exact", torch.device(device), torch.float16)


def test_a_processor_that_is_slower_so_is_refused(settings, tmp_path, monkeypatch):
    """Before anything is read."""
    monkeypatch.setattr(machine, "int8_speedup", lambda dtype: 0.31)
    with pytest.raises(ConfigError, match=r"slower here.* 0\.31 times the speed of one in float32; leave frozen_pr"):
        train(configured(settings, tmp_path / "run", data="missing.jsonl", frozen_products="int8"))


@pytest.mark.usefixtures("fast")
def test_a_model_without_such_layers_is_refused(llama):
    attach(llama, LoRAConfig(r=4, target_modules=["embed_tokens"]))
    with pytest.raises(ConfigError, match="LlamaForCausalLM has none besides its output head"), ready(llama, 9, "int8"):
        pass
    with frozen_products(llama, "exact"):
        pass


def test_the_speed_is_measured_and_positive():
    assert machine.int8_speedup(torch.float32) > 0


def test_the_setting_by_its_names(settings):
    assert configured(settings, "unused").frozen_products == "exact"
    with pytest.raises(ConfigError, match="frozen_products"):
        TrainConfig.from_dict({**settings, "output": "o", "frozen_products": "int4"})


@pytest.mark.usefixtures("fast")
def test_by_the_command(settings, tmp_path):
    given = ["train", settings["data"], "--valid", settings["validation"], "--model", settings["model"]]
    given += [
        "--max-steps",
        "2",
        "--samples",
        "0",
        "--dtype",
        "fp32",
        "--device",
        "cpu",
        "--output",
        str(tmp_path / "a"),
    ]
    result = CliRunner().invoke(main, [*given, "--frozen-products", "int8", "--json"])
    assert result.exit_code == 0, result.stderr
    assert "fp32, int8 in steps on cpu" in result.stderr
    assert read_yaml(tmp_path / "a" / "run.yaml")["frozen_products"] == "int8"
    assert json.loads(result.stdout)["step"] == 2
