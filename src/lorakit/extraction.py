"""An adapter out of two models: the tuned one less its base, layer by layer, at a rank. Reads both from their files,
one weight at a time. Knows no training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lorakit.adapter.compress import Truncated, refactored, with_factors
from lorakit.adapter.config import LoRAConfig
from lorakit.adapter.naming import names_alone
from lorakit.adapter.targets import Target, find_targets
from lorakit.adapter.updates import seeded
from lorakit.adapter.value import Adapter, Factors
from lorakit.checkpoints.folder import Checkpoint, NotStreamableError, find_checkpoint
from lorakit.core import lowrank
from lorakit.errors import AdapterError, ModelError, bullet_list
from lorakit.merging.stream import base_info
from lorakit.models import load_skeleton, local_folder


@dataclass(frozen=True, kw_only=True, eq=False)
class Extracted:
    """What came out.

    Attributes:
        truncated: the adapter, and per layer how much of the difference its rank could not hold.
        left_out: parameters that differ between the models and are not in the adapter -> the norm of their difference
            over their own.
        unchanged: layers of the config that are the same in both, and so are not adapted.
    """

    truncated: Truncated
    left_out: dict[str, float]
    unchanged: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Figures, for JSON."""
        return {**self.truncated.to_dict(), "left_out": self.left_out, "unchanged": list(self.unchanged)}


def extract(tuned: str | Path, base: str | Path, config: LoRAConfig, *, seed: int = 0) -> Extracted:
    """The nearest adapter (Eckart-Young, layer by layer) to the difference of two models of one architecture.

    Large matrices are decomposed by a randomised method (`lowrank.dense_svd`), so the error is measured, not inferred.

    Args:
        tuned: the model after full fine-tuning: folder or Hub id.
        base: the one before.
        config: which layers, and the rank of each; `modules_to_save` take their modules whole. Scale and start mean
            nothing here: the result has scale 1.
        seed: of the randomised decomposition.

    Raises:
        ModelError: a model cannot be found, or is not in safetensors under its own names.
        AdapterError: the models differ in a parameter's shape, or in no layer of the config.
        TargetError: the config names what is not in the model.
    """
    if config.delta != "lora" or config.lora_bias or config.trainable_tokens or config.bias != "none":
        raise AdapterError(
            "extract: gives plain low-rank updates and whole modules: leave delta, bias, lora_bias and "
            "trainable_tokens out"
        )
    skeleton = load_skeleton(str(base))
    before, after = _checkpoint(base, skeleton), _checkpoint(tuned, load_skeleton(str(tuned)))
    differing = sorted(
        name for name in {*before.shapes, *after.shapes} if before.shapes.get(name) != after.shapes.get(name)
    )
    if differing:
        raise AdapterError(
            f"{tuned} and {base} are not of one architecture; parameters that differ in shape or are in one of them "
            f"only:\n{bullet_list(differing, 10)}"
        )
    targets = find_targets(skeleton, config)
    factors, errors, norms = {}, {}, {}
    unchanged: list[str] = []
    replaced: dict[str, torch.Tensor] = {}
    left_out: dict[str, float] = {}
    with before.open() as old, after.open() as new:

        def difference(name: str) -> torch.Tensor:
            return after.read(name, new).float() - before.read(name, old).float()

        held = set()
        for target in targets.layers:
            name = f"{target.path}.{target.site.weight_name}"
            held.add(name)
            delta = difference(name)
            if not delta.any():
                unchanged.append(target.path)
                continue
            factors[target.path], errors[target.path], norms[target.path] = _approximated(target, delta, seed)
        for path in targets.replaced:
            inside = [name for name in after.place if name.startswith(f"{path}.")]
            held.update(inside)
            replaced |= {name: after.read(name, new).float().clone() for name in inside}
        for name in after.place:
            if name not in held and (own := float(torch.linalg.vector_norm(difference(name)))):
                left_out[name] = own / float(torch.linalg.vector_norm(before.read(name, old).float()))
    if not factors:
        raise AdapterError(f"{tuned} is the same as {base} in every layer of the config: there is nothing to extract")
    adapted = replace(
        config, target_modules=names_alone(tuple(factors)), exclude_modules=None, target_parameters=(), layers=None
    )
    shell = Adapter(config=adapted, factors={}, replaced=replaced, base=base_info(before, skeleton))
    truncated = Truncated(adapter=with_factors(shell, factors), errors=errors, norms=norms)
    return Extracted(
        truncated=truncated.noted("extracted", {"tuned": str(tuned), "rank": config.r}),
        left_out=left_out,
        unchanged=tuple(unchanged),
    )


def _checkpoint(model: str | Path, skeleton: Any) -> Checkpoint:
    try:
        return find_checkpoint(local_folder(model), skeleton)
    except NotStreamableError as error:
        raise ModelError(f"extract: {error}") from error


def _approximated(target: Target, delta: torch.Tensor, seed: int) -> tuple[Factors, float, float]:
    """(factors, norm of what they leave out, norm of the whole)."""
    shape_A, shape_B = target.site.shapes(target.module, target.r, target.path)
    kind: Any = target.site.kind
    like = Factors(A=torch.empty(shape_A, device="meta"), B=torch.empty(shape_B, device="meta"), alpha=1.0, kind=kind)
    rows = target.site.rows(delta) if kind != "experts" else delta
    groups = len(like.blocks()[0])
    matrices = rows if rows.ndim == 3 else rows.reshape(groups, -1, rows.shape[-1])  # (groups, outputs, columns)
    rank = target.r // like.rank_shares
    decomposed = lowrank.dense_svd(matrices, rank, seeded(seed, target.path))
    A, B = lowrank.balanced(decomposed, rank)
    left = torch.linalg.vector_norm(matrices.double() - B @ A)
    return refactored(like, A, B, None), float(left), math.sqrt(lowrank.energy(matrices))
