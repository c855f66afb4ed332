"""Whole runs on a tiny model: what they leave, what they refuse, and that a resumed run is the uninterrupted one."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit.adapter.attach import attach
from lorakit.adapter.value import Adapter
from lorakit.data.chat import ChatFormat
from lorakit.data.prepare import prepare
from lorakit.errors import DataError, NonFiniteLossError, RunError, TargetError
from lorakit.files import JsonLines, locked_folder
from lorakit.models import load_model, stop_ids
from lorakit.report import write_report
from lorakit.training.config import TrainConfig
from lorakit.training.events import DataReady, Evaluated, ModelReady, Resumed, StepDone
from lorakit.training.loop import Plan
from lorakit.training.objectives import mean_loss
from lorakit.training.run import _new_folder, read, train
from lorakit.training.settings import _evaluations, as_begun
from lorakit.training.verify import weights_checksum
from tiny_runs import StopAt, adapter_bytes, assert_same_run, configured, metrics, rows, write_rows


@pytest.fixture(scope="module")
def finished(tmp_path_factory, settings):
    """One uninterrupted run of the fixture's settings: (folder, Run, events)."""
    folder, events = tmp_path_factory.mktemp("finished") / "run", []
    return folder, train(configured(settings, folder), events.append), events


# ---------------------------------------------------------------- what a run leaves


def test_loss_goes_down_and_the_adapter_is_verified(finished):
    folder, run, _ = finished
    assert run.best_loss < run.initial_loss - 0.1
    assert not run.interrupted
    assert (run.step, run.total_steps) == (10, 10)
    best = Adapter.load(folder / "best")
    best.check()
    assert run.adapter_bytes == (folder / "best" / "adapter_model.safetensors").stat().st_size


def test_run_folder_is_complete(finished):
    folder, run, _ = finished
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".lock")}
    pages = {"run.yaml", "metrics.jsonl", "data.json", "samples.json", "result.json", "report.html"}
    assert names == pages | {"best", "last", "checkpoints"}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= {
        p.name for p in (folder / "best").iterdir()
    }
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-10", "step-9"]
    assert json.loads((folder / "result.json").read_text()) == run.to_dict()


def test_metrics_have_a_row_a_step_and_a_row_an_evaluation(finished):
    folder, run, _ = finished
    found = JsonLines(folder / "metrics.jsonl").rows()
    steps = [row for row in found if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 11))
    assert all(set(row) == {"step", "loss", "lr", "grad_norm", "tokens", "seconds"} for row in steps)
    evaluations = [row for row in found if "eval_loss" in row]
    assert [row["step"] for row in evaluations] == [0, 4, 8, 10]
    assert run.best_loss == min(row["eval_loss"] for row in evaluations[1:])
    assert run.tokens == sum(row["tokens"] for row in steps)


def test_run_yaml_is_resolved_and_makes_the_same_run(finished, tmp_path):
    folder, _, _ = finished
    again = TrainConfig.from_yaml(folder / "run.yaml").replace(output=str(tmp_path / "again"))
    assert (again.dtype, again.device, again.resume) == ("fp32", "cpu", False)
    train(again)
    assert_same_run(folder, tmp_path / "again")


def test_without_output_a_run_gets_the_first_free_folder_of_its_data(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = {**settings, "max_steps": 1, "samples": 0}
    with pytest.raises(TargetError):
        train(TrainConfig.from_dict({**short, "lora": {"target_modules": ["q_prok"]}}))
    folders = [train(TrainConfig.from_dict(short)).directory for _ in range(2)]
    assert folders == ["runs/train-1", "runs/train-2"]  # what failed before it began left its folder free
    assert TrainConfig.from_yaml("runs/train-2/run.yaml").output == str(tmp_path / "runs" / "train-2")


@pytest.mark.parametrize(
    ("data", "name"),
    [("some/where/data.jsonl", "data-1"), ("owner/set", "set-1"), ("owner/set:split", "set-split-1"), (".", "run-1")],
)
def test_a_new_folder_is_named_by_its_data(data, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert _new_folder(data) == Path("runs") / name


def test_events_tell_the_story_in_order(finished):
    _, run, events = finished
    kinds = [type(event) for event in events]
    assert kinds.index(DataReady) < kinds.index(ModelReady) < kinds.index(Evaluated) < kinds.index(StepDone)
    data, model = events[kinds.index(DataReady)], events[kinds.index(ModelReady)]
    assert (data.train_rows, data.valid_rows) == (40, 6)
    assert (model.parameters, model.trained, model.layers) == (run.parameters, run.trained_parameters, 14)


def test_best_gives_the_loss_it_was_chosen_for(finished):
    """The saved adapter, loaded into a fresh base, has exactly the validation loss that metrics.jsonl says."""
    folder, run, _ = finished
    config = TrainConfig.from_yaml(folder / "run.yaml")
    model, tokenizer = load_model(config.model, "fp32", "cpu")
    chat = ChatFormat(tokenizer, stop_ids(model, tokenizer), config.max_length)
    attach(model, folder / "best")
    valid = prepare(config.validation, chat).examples
    assert mean_loss(model, valid, micro_batch_tokens=120)[0] == run.best_loss


def test_user_random_state_is_untouched(settings, tmp_path):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    train(configured(settings, tmp_path / "run", max_steps=2, samples=0))
    assert torch.equal(torch.rand(3), expected)


def test_rows_are_read_with_and_without_the_token_cache(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lorakit.data.token_cache.WORTHWHILE", 0)
    without = read(configured(settings, tmp_path / "run", token_cache=False))
    assert not (tmp_path / "cache").exists()
    for _ in range(2):
        kept = read(configured(settings, tmp_path / "run"))
        assert (kept.train, kept.valid) == (without.train, without.valid)
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 2


def test_base_files_are_untouched(settings, tmp_path, base_folder):
    before = {path.name: path.read_bytes() for path in base_folder.iterdir()}
    train(configured(settings, tmp_path / "run", max_steps=2, samples=0))
    assert {path.name: path.read_bytes() for path in base_folder.iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "steps"),
    [({"epochs": 0.5}, 4), ({"epochs": 1.0}, 7), ({"epochs": 1.2}, 9), ({"epochs": 9.0, "max_steps": 2}, 2)],
)
def test_length_of_a_run(settings, tmp_path, changes, steps):
    """40 rows, 6 a step: 7 steps an epoch."""
    run = train(
        configured(
            {**settings, "max_steps": None, "eval_steps": None, "save_steps": None, "samples": 0},
            tmp_path / "run",
            **changes,
        )
    )
    assert run.total_steps == steps
    resolved = TrainConfig.from_yaml(tmp_path / "run" / "run.yaml")
    assert resolved.save_steps == math.ceil(steps / 8)
    assert math.ceil(steps / 8) <= resolved.eval_steps <= math.ceil(steps / 2)


@pytest.mark.parametrize(("valid_tokens", "evaluations"), [(1, 4), (5_000, 4), (6_000, 3), (10_000, 2), (10**9, 2)])
def test_evaluations_take_a_tenth_of_the_time_at_most_but_there_are_two(valid_tokens, evaluations):
    plan = Plan(lengths=(100,) * 1000, seed=0, rows_per_step=10, micro_batch_tokens=1000, total_steps=100)
    assert plan.tokens == 100_000
    assert _evaluations(plan, valid_tokens) == evaluations
    assert _evaluations(plan, valid_tokens, early_stop=1) == 4  # enough of them to stop at
    assert _evaluations(plan, valid_tokens, early_stop=10) == 20


def wrong_answers(settings, folder):
    """Settings of a run that learns to answer with a's while the validation rows want z's."""

    def answers(text):
        return [{"prompt": f"{i}?", "completion": text} for i in range(12)]

    data = write_rows(folder / "train.jsonl", answers("a" * 40))
    valid = write_rows(folder / "valid.jsonl", answers("z" * 40))
    return {**settings, "data": str(data), "validation": str(valid), "learning_rate": 0.05}


def test_early_stop_counts_evaluations_without_better(settings, tmp_path):
    changed = wrong_answers(settings, tmp_path)
    run = train(configured(changed, tmp_path / "run", eval_steps=1, early_stop=2, max_steps=40))
    assert run.stopped_early
    assert run.step == run.best_step + 2 < 40
    assert json.loads((tmp_path / "run" / "result.json").read_text())["stopped_early"]


def test_an_adapter_worse_than_the_base_is_said_to_be(settings, tmp_path):
    changed = wrong_answers(settings, tmp_path)
    run = train(configured(changed, tmp_path / "run", max_steps=20, eval_steps=20))
    assert run.best_loss > run.initial_loss
    assert "no better than the base" in (tmp_path / "run" / "report.html").read_text()


def test_the_base_own_dropout_is_on_in_steps_only_and_seeded(settings, tmp_path, base_folder):
    """As in PEFT, train mode is the whole model's: the base's attention dropout changes steps, not evaluations."""
    base = shutil.copytree(base_folder, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.3}))
    plain = {**settings, "lora": {"r": 4, "dropout": 0.0}}
    for name, model in (("without", base_folder), ("with", base), ("again", base)):
        train(configured({**plain, "model": str(model)}, tmp_path / name, max_steps=2, samples=0))
    without, dropped, again = (metrics(tmp_path / name) for name in ("without", "with", "again"))
    assert without[0] == dropped[0]
    assert without[1]["loss"] != dropped[1]["loss"]
    assert dropped == again


# ---------------------------------------------------------------- what it refuses


def test_a_used_folder_is_refused_before_anything_is_read(finished, settings):
    folder, _, _ = finished
    before = (folder / "result.json").read_bytes()
    with pytest.raises(RunError, match=r"holds another run.*lorakit train --resume --output"):
        train(configured({**settings, "model": "does/not-exist", "data": "absent.jsonl"}, folder))
    assert (folder / "result.json").read_bytes() == before


def test_a_locked_folder_is_refused(settings, tmp_path):
    with locked_folder(tmp_path / "run"), pytest.raises(RunError, match="in use by process"):
        train(configured(settings, tmp_path / "run"))


def test_bad_rows_leave_a_folder_that_can_be_used(settings, tmp_path):
    bad = write_rows(tmp_path / "bad.jsonl", [{"messages": [{"role": "user", "content": "no answer"}]}])
    with pytest.raises(DataError):
        train(configured({**settings, "data": str(bad)}, tmp_path / "run"))
    run = train(configured(settings, tmp_path / "run", max_steps=1, samples=0))
    assert run.step == 1


def test_a_target_that_is_not_there_leaves_a_folder_that_can_be_used(settings, tmp_path):
    with pytest.raises(TargetError, match="q_prok"):
        train(configured({**settings, "lora": {"target_modules": ["q_prok"]}}, tmp_path / "run"))
    assert not (tmp_path / "run" / "run.yaml").exists()


def test_finished_run_cannot_be_resumed(finished, settings):
    folder, _, _ = finished
    with pytest.raises(RunError, match="finished run"):
        train(configured(settings, folder, resume=True))


def test_nothing_to_resume(settings, tmp_path):
    with pytest.raises(RunError, match="no run to go on with"):
        train(configured(settings, tmp_path / "run", resume=True))


def poisoned(base_folder, folder, value):
    """A copy of the base with one weight replaced."""
    shutil.copytree(base_folder, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_non_finite_loss_is_refused(settings, tmp_path, base_folder):
    base = poisoned(base_folder, tmp_path / "base", math.nan)
    with pytest.raises(NonFiniteLossError, match="nan"):
        train(configured({**settings, "model": str(base)}, tmp_path / "run", samples=0))
    assert not (tmp_path / "run" / "best").exists()


def test_divergence_names_step_and_rows_and_keeps_good_checkpoints(settings, tmp_path):
    """At this rate the logits overflow after a few updates."""
    diverging = configured(
        settings,
        tmp_path / "run",
        learning_rate=1e38,
        warmup=0.0,
        schedule="constant",
        clip=0.0,
        eval_steps=50,
        save_steps=1,
    )
    with pytest.raises(NonFiniteLossError) as caught:
        train(diverging)
    assert "step" in str(caught.value)
    for path in (tmp_path / "run").glob("checkpoints/step-*/adapter.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values())
    assert not (tmp_path / "run" / "result.json").exists()


# ---------------------------------------------------------------- resuming


VARIANTS = {
    "dropout": {},
    "accumulation": {"batch_size": 2, "gradient_accumulation_steps": 3, "lora": {"r": 4, "dropout": 0.0}},
    "biases": {"lora": {"r": 4, "dropout": 0.2, "modules_to_save": ["model.norm"]}, "save_steps": 2},
    "bf16": {"dtype": "bf16"},
    "fp16": {"dtype": "fp16"},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stop_at", [4, 8])
def test_interrupted_and_resumed_equals_uninterrupted(settings, tmp_path, variant, stop_at):
    """Both steps owe an evaluation; step 8 lies in the second epoch."""
    changed = {**settings, **VARIANTS[variant]}
    train(configured(changed, tmp_path / "straight"))
    first = train(configured(changed, tmp_path / "broken"), StopAt(stop_at))
    assert first.interrupted
    assert first.step == stop_at
    assert "Interrupted at step" in (tmp_path / "broken" / "report.html").read_text()
    assert bool(cursor(tmp_path / "broken", stop_at)["scaler"]) == (variant == "fp16")
    last = metrics(tmp_path / "broken")[-1]
    assert (last["step"], "loss" in last) == (stop_at, True)  # the evaluation that step 4 and 8 owe is left for later
    events = []
    second = train(configured(changed, tmp_path / "broken", resume=True), events.append)
    assert not second.interrupted
    assert Resumed(stop_at) in events
    assert_same_run(tmp_path / "straight", tmp_path / "broken")
    assert cursor(tmp_path / "straight", 10) == cursor(tmp_path / "broken", 10)


def cursor(folder, step):
    """A checkpoint's cursor without the wall clock."""
    found = json.loads((folder / "checkpoints" / f"step-{step}" / "cursor.json").read_text())
    del found["seconds"]
    return found


def test_resuming_needs_only_the_folder(settings, tmp_path):
    train(configured(settings, tmp_path / "run"), StopAt(3))
    run = train(TrainConfig.from_yaml(tmp_path / "run" / "run.yaml").replace(resume=True))
    assert (run.step, run.interrupted) == (10, False)


def test_damaged_newest_checkpoint_falls_back_and_is_told(settings, tmp_path, finished):
    train(configured(settings, tmp_path / "run"), StopAt(8))
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-6", "step-8"]
    weights = tmp_path / "run" / "checkpoints" / "step-8" / "optimizer.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    events = []
    train(configured(settings, tmp_path / "run", resume=True), events.append)
    resumed = next(event for event in events if isinstance(event, Resumed))
    assert resumed.step == 6
    assert "step-8" in resumed.damaged[0]
    assert_same_run(finished[0], tmp_path / "run")


def test_best_of_later_steps_is_not_kept_when_falling_back(settings, tmp_path, finished):
    """best/ on disk may be newer than the checkpoint; after an interruption it must be the checkpoint's."""
    train(configured(settings, tmp_path / "run", eval_steps=1), StopAt(6))
    step_6 = adapter_bytes(tmp_path / "run", "best")
    manifest = tmp_path / "run" / "checkpoints" / "step-6" / "manifest.json"
    manifest.unlink()
    train(configured(settings, tmp_path / "run", eval_steps=1, resume=True), StopAt(4))
    assert json.loads((tmp_path / "run" / "result.json").read_text())["best_step"] <= 4
    assert adapter_bytes(tmp_path / "run", "best") != step_6


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"learning_rate": 1e-3}, "learning_rate: 0.005 then, 0.001 now"),
        ({"max_steps": 20}, "max_steps: 10 then, 20 now"),
        ({"seed": 1}, "seed: 0 then, 1 now"),
        ({"lora": {"r": 8, "alpha": 8.0, "dropout": 0.1}}, "lora"),
        ({"micro_batch_tokens": 4096}, "micro_batch_tokens"),
    ],
)
def test_resuming_something_else_is_refused(settings, tmp_path_factory, interrupted, changes, reason):
    with pytest.raises(RunError, match=reason):
        train(configured({**settings, **changes}, interrupted, resume=True))


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, settings):
    """A run stopped at step 5; tests must not go on with it successfully."""
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    train(configured(settings, folder), StopAt(5))
    return folder


def test_resuming_with_other_rows_is_refused(settings, tmp_path, interrupted):
    other = write_rows(tmp_path / "train.jsonl", rows(41))
    with pytest.raises(RunError, match="data: the training rows"):
        train(configured({**settings, "data": str(other)}, interrupted, resume=True))


def test_resuming_on_another_base_is_refused(settings, tmp_path, interrupted):
    from tiny_models import byte_tokenizer, tiny_llama

    tiny_llama(context=512, seed=1).save_pretrained(tmp_path / "base")
    byte_tokenizer(eos="<|im_end|>").save_pretrained(tmp_path / "base")
    with pytest.raises(RunError, match="model: base: same shapes, other weights"):
        train(configured({**settings, "model": str(tmp_path / "base")}, interrupted, resume=True))


def test_moved_files_are_the_same_run(settings, tmp_path, data_files, finished):
    """Paths may change between the parts of a run; content may not."""
    train(configured(settings, tmp_path / "before"), StopAt(3))
    (tmp_path / "before").rename(tmp_path / "after")
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(data_files[0].read_bytes())
    train(configured({**settings, "data": str(copy)}, tmp_path / "after", resume=True))
    assert metrics(tmp_path / "after") == metrics(finished[0])


def test_report_is_a_function_of_the_folder(finished):
    folder, _, _ = finished
    before = (folder / "report.html").read_bytes()
    write_report(folder)
    assert (folder / "report.html").read_bytes() == before


# ---------------------------------------------------------------- the proof that the base is unchanged


def test_checksum_sees_one_bit(base_folder):
    model, _ = load_model(str(base_folder), "bf16", "cpu")
    before = weights_checksum(model)
    weight = model.model.layers[0].mlp.down_proj.weight.detach().view(-1).view(torch.int16)
    weight[17] ^= 1
    assert weights_checksum(model) != before
    weight[17] ^= 1
    assert weights_checksum(model) == before


def test_a_changed_base_is_not_called_done(settings, tmp_path, monkeypatch):
    """Somebody's callback writes into a base weight during training."""
    import lorakit.training.subject as module

    seen = []
    original = module.attach
    monkeypatch.setattr(
        module, "attach", lambda model, *args, **named: seen.append(model) or original(model, *args, **named)
    )

    def disturb(event):
        if isinstance(event, StepDone) and event.step == 2:
            with torch.no_grad():
                seen[0].model.norm.weight[0] += 1e-3

    with pytest.raises(RunError, match="base model's weights changed"):
        train(configured(settings, tmp_path / "run", max_steps=3), disturb)
    assert not (tmp_path / "run" / "result.json").exists()


def test_memory_that_runs_out_is_told_with_what_to_change(settings, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines.")

    monkeypatch.setattr("lorakit.training.loop.accumulate", fail)
    with pytest.raises(RunError) as raised:
        train(configured({**settings, "micro_batch_tokens": 3000, "samples": 0}, tmp_path / "run"))
    message = str(raised.value)
    assert "--gradient-checkpointing on" in message
    assert "--micro-batch-tokens 1500" in message
    assert "More lines" not in message
    monkeypatch.setattr("lorakit.training.loop.accumulate", lambda *a, **k: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        train(configured({**settings, "samples": 0}, tmp_path / "other"))


def test_what_was_chosen_for_the_memory_there_was_holds_when_a_run_goes_on(settings, tmp_path):
    begun = configured(settings, tmp_path, gradient_checkpointing="on")
    (tmp_path / "run.yaml").write_text(begun.to_yaml())
    left_open = configured(settings, tmp_path, resume=True)
    assert left_open.gradient_checkpointing == "auto"
    assert as_begun(left_open, tmp_path).gradient_checkpointing == "on"
    decided = left_open.replace(gradient_checkpointing="off")
    assert as_begun(decided, tmp_path).gradient_checkpointing == "off"


def test_what_auto_came_to_holds_when_a_run_goes_on(settings, tmp_path):
    begun = configured(settings, tmp_path, batch_size=16, micro_batch_tokens=700)
    (tmp_path / "run.yaml").write_text(begun.to_yaml())
    left_open = configured(settings, tmp_path, batch_size="auto", resume=True)
    gone_on = as_begun(left_open, tmp_path)
    assert (gone_on.batch_size, gone_on.micro_batch_tokens) == (16, 700)
