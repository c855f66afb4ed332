"""What a run is of: what determines its numbers, recorded in each checkpoint, compared on resuming. Knows no files."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from lorakit.adapter import fingerprint
from lorakit.adapter.value import BaseInfo
from lorakit.data.chat import Example
from lorakit.training.config import TrainConfig
from lorakit.version import __version__

# Where things lie (what lies there is compared instead; the device under `machine`), and what is kept beside the run.
_PLACES = {"model", "data", "validation", "validation_share", "output", "device", "loftq_original"}
_BESIDE = {"resume", "keep_checkpoints", "save_steps", "samples", "token_cache"}


def identity_of(
    config: TrainConfig,
    train: Sequence[Example],
    valid: Sequence[Example],
    template: str | None,
    base: BaseInfo,
    device: torch.device,
) -> dict[str, Any]:
    """The identity of a run as plain JSON values.

    Args:
        config: fully resolved.
        train: training rows as tokens.
        valid: validation rows as tokens.
        template: the chat template in use, if any.
        base: fingerprint of the base.
        device: where it is trained.
    """
    return {
        "config": {key: value for key, value in config.to_dict().items() if key not in _PLACES | _BESIDE},
        "data": examples_digest(train),
        "validation": examples_digest(valid),
        "template": hashlib.sha256((template or "").encode()).hexdigest(),
        "base": {**asdict(base), "samples": list(base.samples)},
        "machine": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "lorakit": __version__,
        },
    }


def examples_digest(examples: Sequence[Example]) -> str:
    """SHA-256 over every token and its mask, in order: what the model is trained on, whatever file it came from."""
    hasher = hashlib.sha256()
    for example in examples:
        hasher.update(repr((list(example.ids), list(example.trained))).encode())
    return hasher.hexdigest()


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Why `now` cannot go on from a checkpoint of `then`, one sentence each; empty where it can."""
    found = [
        f"{key}: {_shown(then['config'], key)} then, {_shown(now['config'], key)} now"
        for key in sorted({*then["config"], *now["config"]})
        if then["config"].get(key) != now["config"].get(key)
    ]
    for key, words in (("data", "the training rows, as tokens,"), ("validation", "the validation rows, as tokens,")):
        if then[key] != now[key]:
            found.append(f"{key}: {words} are not those the run began with")
    if then["template"] != now["template"]:
        found.append("chat_template: the template's text is not the one the run began with")
    made_on, here = (BaseInfo(**{**base, "samples": tuple(base["samples"])}) for base in (then["base"], now["base"]))
    return found + [f"model: {reason}" for reason in fingerprint.differences(made_on, here)]


def machine_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, ...]:
    """What differs in the machine: the run can go on, to rounding and not to the bit."""
    return tuple(
        f"{key} {was} -> {now['machine'][key]}" for key, was in then["machine"].items() if now["machine"][key] != was
    )


def _shown(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "absent"
