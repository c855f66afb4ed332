"""Full fine-tuning (`method: full`): every weight moves, the run folder holds a model, and resuming is exact."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import lorakit
from lorakit.errors import ConfigError
from lorakit.training.config import TrainConfig
from lorakit.training.run import train
from tiny_runs import configured, metrics


@pytest.fixture
def settings(base_folder, data_files):
    train, valid = map(str, data_files)
    return {
        "model": str(base_folder),
        "data": train,
        "validation": valid,
        "method": "full",
        "batch_size": 8,
        "samples": 1,
    }


def test_every_weight_is_trained_and_the_model_in_best_is_the_one_that_was_measured(settings, tmp_path):
    run = train(configured(settings, tmp_path / "run", epochs=4, learning_rate=3e-3))
    assert run.adapter is None
    assert run.adapter_bytes is None
    assert run.model == str(tmp_path / "run" / "best")
    assert run.trained_parameters == run.parameters
    assert run.best_loss < 0.9 * run.initial_loss
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (settings["model"], run.model))
    for (name, one), other in zip(before.named_parameters(), after.parameters(), strict=True):
        assert other.dtype == torch.float32
        assert not torch.equal(one, other), name
    (result,) = lorakit.evaluate(data=settings["validation"], model=run.model)
    assert result.scores["loss"] == pytest.approx(run.best_loss, rel=1e-5)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["model"] == run.model
    assert "Model file" in (tmp_path / "run" / "report.html").read_text()


def test_an_interrupted_run_goes_on_bit_for_bit(settings, tmp_path):
    from lorakit.training.events import StepDone

    class StoppedError(Exception):
        pass

    def stop(event):
        if isinstance(event, StepDone) and event.step == 7:
            raise StoppedError

    whole = train(configured(settings, tmp_path / "whole", max_steps=10))
    with pytest.raises(StoppedError):
        train(configured(settings, tmp_path / "halves", max_steps=10), stop)
    halves = train(configured(settings, tmp_path / "halves", max_steps=10, resume=True))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "halves")
    weights = [(run / "best" / "model.safetensors").read_bytes() for run in (tmp_path / "whole", tmp_path / "halves")]
    assert weights[0] == weights[1]
    assert halves.best_loss == whole.best_loss


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"r": 4}}, "lora: has no meaning with method full"),
        ({"dtype": "bf16"}, "dtype: full fine-tuning moves weights by less than bf16 can hold"),
    ],
)
def test_settings_without_meaning_are_refused(settings, changes, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_dict({**settings, **changes})
