"""The form in which PEFT saves an adapter that began as a part of its base's weight (PiSSA, OLoRA, LoRA-GA): A and B of
the rank it was trained with, and the base they are for, W - s B0 A0, which is another one than the pristine base.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorakit import files, models
from lorakit.adapter.began import BEGAN, residual_form
from lorakit.adapter.value import Adapter, BaseInfo
from lorakit.errors import AdapterError, ConfigError
from lorakit.merging import Merge, merge

BASE, ADAPTER = "base", "adapter"


@dataclass(frozen=True, kw_only=True)
class Residual:
    """What was written.

    Attributes:
        base: folder of the residual base.
        adapter: folder of the adapter for it.
        rank: of the adapter.
        merge: how the base came about, and the proof that it is what it should be.
    """

    base: Path
    adapter: Path
    rank: int
    merge: Merge

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "base": str(self.base),
            "adapter": str(self.adapter),
            "rank": self.rank,
            "merge": self.merge.to_dict(),
        }


def save_residual(
    adapter: str | Path | Adapter,
    output: str | Path,
    *,
    model: str | None = None,
    dtype: str = "auto",
    verify: bool = True,
    on_stage: Callable[[str], None] | None = None,
) -> Residual:
    """Write `output`/base, a model, and `output`/adapter, PEFT's folder, which names it as its base.

    What B0 A0 leaves of a weight is rounded to the base's dtype once more; in fp32 that is nothing to speak of.

    Args:
        adapter: that began so; a folder, a file or a value.
        output: a folder that does not exist yet, or is empty.
        model: its base, as `load_model` takes it; None: what the adapter names.
        dtype: of the residual base: auto (as in the base's files), fp32, bf16, fp16.
        verify: as in `merge`.
        on_stage: likewise.

    Raises:
        AdapterError: the adapter did not begin as a part of its base's weight.
        ConfigError: something is in `output`.
        MergeError: the residual base does not compute what it should; nothing is written. Other errors as in `merge`.
    """
    output = Path(output)
    if not files.is_vacant(output):
        raise ConfigError(f"output: {output} exists; choose another folder, or remove it first")
    if isinstance(adapter, Adapter):
        value, spec = adapter, model or (adapter.base.name if adapter.base is not None else None)
    else:
        spec = model or models.common_base([adapter])
        value = models.read_adapter(adapter, spec)
    if BEGAN not in value.metadata:
        raise AdapterError(
            "the residual form is for adapters that began as a part of their base's weight (init pissa, olora or "
            "lora_ga); this one did not, or was changed since: any tool takes it as it is, on the base as it is"
        )
    live, moved = residual_form(value)
    with files.atomic_folder(output) as building:
        merged = merge(
            adapters=[moved], output=building / BASE, model=spec, dtype=dtype, verify=verify, on_stage=on_stage
        )
        base, architecture = output.resolve() / BASE, value.base.architecture if value.base is not None else ""
        info = BaseInfo(name=str(base), architecture=architecture, dtype="", structure="", samples=())
        replace(live, base=info).save(building / ADAPTER)
    return Residual(
        base=output / BASE,
        adapter=output / ADAPTER,
        rank=live.config.r,
        merge=replace(merged, output=output / BASE),
    )
