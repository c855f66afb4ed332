"""Checkpoints: exact, pruned only when newer ones are sound, refused when damaged."""

import json

import pytest
import torch

from lorakit.errors import RunError
from lorakit.training.checkpoint import Cursor, load_newest, save_checkpoint

IDENTITY = {"data": "abc", "config": {"seed": 0}}


def tensors(step):
    generator = torch.Generator().manual_seed(step)
    return {"a.A": torch.randn(4, 3, generator=generator), "a.B": torch.randn(3, 4, generator=generator)}


def fixed(step):
    return {name + "0": tensor + 1 for name, tensor in tensors(step).items()}


def save(folder, step, keep=2):
    cursor = Cursor(step=step, tokens=10 * step, best_loss=1 / 3, best_step=step, scaler={"scale": 32768.0})
    optimizer = {f"exp_avg.{name}": tensor / 7 for name, tensor in tensors(step).items()}
    return save_checkpoint(folder, cursor, tensors(step), optimizer, tensors(step), fixed(step), IDENTITY, keep)


def damage(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_round_trip_is_exact(tmp_path):
    path = save(tmp_path, 3)
    checkpoint, identity, damaged = load_newest(tmp_path)
    assert checkpoint.path == path == tmp_path / "step-3"
    assert identity == IDENTITY
    assert damaged == []
    assert checkpoint.cursor == Cursor(step=3, tokens=30, best_loss=1 / 3, best_step=3, scaler={"scale": 32768.0})
    for name, tensor in tensors(3).items():
        assert torch.equal(checkpoint.adapter[name], tensor)
        assert torch.equal(checkpoint.best[name], tensor)
        assert torch.equal(checkpoint.fixed[name + "0"], tensor + 1)
        assert torch.equal(checkpoint.optimizer[f"exp_avg.{name}"], tensor / 7)


def test_no_pickle_and_no_foreign_file(tmp_path):
    path = save(tmp_path, 1)
    assert names(path) == [
        "adapter.safetensors",
        "best.safetensors",
        "cursor.json",
        "fixed.safetensors",
        "manifest.json",
        "optimizer.safetensors",
    ]


def test_no_checkpoint_yet(tmp_path):
    assert load_newest(tmp_path / "absent") == (None, {}, [])


def test_keeps_the_newest_by_number_not_by_name(tmp_path):
    for step in (8, 9, 10, 100):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-10", "step-100"]


def test_a_damaged_elder_does_not_count_as_kept(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    damage(tmp_path / "step-2" / "adapter.safetensors")
    save(tmp_path, 3)
    assert names(tmp_path) == ["step-1", "step-3"]


@pytest.mark.parametrize("file", ["adapter.safetensors", "optimizer.safetensors", "cursor.json", "manifest.json"])
def test_damaged_newest_falls_back_and_is_told(tmp_path, file):
    save(tmp_path, 1)
    save(tmp_path, 2)
    damage(tmp_path / "step-2" / file)
    checkpoint, _, damaged = load_newest(tmp_path)
    assert checkpoint.cursor.step == 1
    assert len(damaged) == 1
    assert "step-2" in damaged[0]


def test_a_renamed_checkpoint_is_not_taken_for_another(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2).rename(tmp_path / "step-7")
    checkpoint, _, damaged = load_newest(tmp_path)
    assert checkpoint.cursor.step == 1
    assert "of another checkpoint" in damaged[0]


def test_a_cursor_of_another_version_is_not_guessed_at(tmp_path):
    path = save(tmp_path, 1)
    cursor = json.loads((path / "cursor.json").read_text())
    del cursor["tokens"]
    rewrite(path, cursor)
    with pytest.raises(RunError, match="not a cursor of this version"):
        load_newest(tmp_path)


def rewrite(path, cursor):
    """A sound folder around another cursor."""
    from lorakit.files import atomic_folder, write_json

    files = {name: (path / name).read_bytes() for name in names(path) if name.endswith("safetensors")}
    with atomic_folder(path, manifest={"step": 1, "identity": IDENTITY}) as building:
        for name, data in files.items():
            (building / name).write_bytes(data)
        write_json(building / "cursor.json", cursor)


def test_leftovers_of_a_killed_writer_are_removed(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".tmp-0123").mkdir()
    (tmp_path / ".tmp-0123" / "adapter.safetensors").write_bytes(b"half")
    (tmp_path / ".previous-step-1").mkdir()
    (tmp_path / ".tmp-4567").write_bytes(b"half")
    checkpoint, _, _ = load_newest(tmp_path)
    assert checkpoint.cursor.step == 1
    assert names(tmp_path) == ["step-1"]


def test_nothing_sound_is_an_error(tmp_path):
    save(tmp_path, 1)
    damage(tmp_path / "step-1" / "optimizer.safetensors")
    with pytest.raises(RunError, match="no checkpoint is sound"):
        load_newest(tmp_path)
