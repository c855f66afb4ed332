"""LoftQ's start (arXiv 2310.08659): adapters that begin with what quantising took from their base, found out from the
weights it was made of, which are read from disk one after another. Knows no training.

The base stays as it is: A and B of a layer are the best approximation, s B A of rank r, of W - Q. (The paper goes on to
quantise W - s B A and so forth, which makes another base for every adapter.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lorakit.adapter.config import LoRAConfig
from lorakit.adapter.starts import Starts
from lorakit.adapter.targets import Target, find_targets
from lorakit.adapter.updates import beginning, seeded
from lorakit.checkpoints.folder import Checkpoint, NotStreamableError
from lorakit.core import initializers, lowrank
from lorakit.core.initializers import Init
from lorakit.errors import ConfigError, ModelError, bullet_list
from lorakit.models import checkpoint_of, load_skeleton
from lorakit.quant.tensor import QuantizedTensor

_MOST_LOST = 0.7  # of a weight's norm: coarse formats lose a third, a weight of another model more than the whole


def refuse_storage(init: str, storage: str, original: str | Path | None) -> None:
    """Refuse a base of which it is known before it is loaded that LoftQ cannot begin on it.

    Args:
        init: of the config; every other one may.
        storage: how the base is held (`BaseInfo.storage`).
        original: the model it was made of, if it is given.

    Raises:
        ConfigError: the base is not quantised, or its own file holds nothing but what was left.
    """
    if init != "loftq":
        return
    if storage == "none":
        raise ConfigError(
            "init 'loftq' makes up for what quantising the base lost, and this base is not quantised: load it with "
            "quantize nf4 or int8 (--quantize nf4), or choose pissa, which starts from the weight itself"
        )
    if storage == "blocks" and original is None:
        raise ConfigError(
            "init 'loftq' needs the weights that were quantised, and a .gguf file holds only what was left of them: "
            "name the dense model it was made of by loftq_original (--loftq-original MODEL), or choose pissa"
        )


def starts_from_original(
    model: Any, config: LoRAConfig, original: str | Path | None = None, *, seed: int = 0
) -> Starts:
    """Find out what quantising took from a base. The model is as it was afterwards; one dense weight is held at a time.

    Args:
        model: the base, quantised, without adapters.
        config: with init "loftq". Layers that are not quantised begin as with "default".
        original: the model that was quantised: Hub id, folder or .gguf file; None: the one that `model` was loaded
            from, where that was quantised while it was read.
        seed: of the draws for layers that are not quantised.

    Returns:
        What `attach` and `add` take in place of the config. The adapter's update is not zero at the start.

    Raises:
        ConfigError: another init, a base that is not quantised or has no original, or a rank the layers cannot give.
        ModelError: the original cannot be found or read tensor by tensor, or is not what the base was made of.
        TargetError: the config names what is not in the model.
    """
    if config.init != "loftq":
        raise ConfigError(f"init {config.init!r} needs no original: attach the config itself")
    targets = find_targets(model, config).layers
    lossy = {t.path: weight for t in targets if isinstance(weight := _weight(t), QuantizedTensor)}
    storage = "blocks" if any(w.format.name not in ("nf4", "int8") for w in lossy.values()) else "quantised"
    refuse_storage(config.init, storage if lossy else "none", original)
    spec = str(original or model.name_or_path)
    checkpoint = _checkpoint(spec)
    inits: dict[str, Init] = {}
    problems: list[str] = []
    lost = 0.0
    for target in targets:
        if target.path not in lossy:
            plain = config.replace(init="default")
            inits[target.path] = beginning(plain, target, _weight(target), seeded(seed, target.path))
            continue
        Q = lossy[target.path].dense(torch.float32)
        name = f"{target.path}.{target.site.weight_name}"
        if checkpoint.shapes.get(name) != tuple(Q.shape):
            problems.append(f"{name}: {checkpoint.shapes.get(name, 'not there')}, in the base {tuple(Q.shape)}")
            continue
        with checkpoint.open() as shards:  # closed again: what has been read of a file need not stay in memory
            W = checkpoint.read(name, shards).float()
        share = float(torch.linalg.vector_norm(W - Q) / torch.linalg.vector_norm(W))
        if not share <= _MOST_LOST:
            problems.append(f"{name}: differs from the base's by {share:.0%} of its norm")
            continue
        lost = max(lost, share)
        inits[target.path] = _approximated(target, config, W, Q)
    if problems:
        raise ModelError(
            f"{spec} is not what this {type(model).__name__} was quantised from:\n{bullet_list(problems, 5)}\n"
            "Name that by loftq_original (--loftq-original)"
        )
    if not lost:
        raise ModelError(f"{spec} holds the very numbers of the base, so there is nothing that was lost")
    return Starts(config=config, inits=inits)


def _weight(target: Target) -> torch.Tensor:
    return target.module.get_parameter(target.site.weight_name)


def _checkpoint(spec: str) -> Checkpoint:
    try:
        return checkpoint_of(spec, load_skeleton(spec), "blocks")  # of a GGUF file the numbers of its blocks
    except NotStreamableError as error:
        raise ModelError(f"init 'loftq' reads the original one weight at a time: {error}") from error


def _approximated(target: Target, config: LoRAConfig, W: torch.Tensor, Q: torch.Tensor) -> Init:
    """A and B with s B A nearest to W - Q, both in the layout of the layer's weight."""
    site = target.site
    s = lowrank.scale(target.alpha, target.r, config.scaling)
    held = site.matrices(Q, 1)

    def factorise(weight: torch.Tensor, r: int, s: float, _: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        return initializers.loftq(weight, r, s, lambda _: held)[:2]

    shapes = site.shapes(target.module, target.r, target.path)
    try:
        init = initializers.from_weight(factorise, site.matrices(W, 1), *shapes, s, torch.Generator())
    except ConfigError as error:
        raise ConfigError(f"{target.path}: init 'loftq': {error}") from None
    return init._replace(from_start=False)
