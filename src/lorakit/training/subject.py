"""What a run trains: an adapter on a frozen base, or every weight of the model (`method: full`). Knows how each is put
in place, saved and proved; knows no steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch

from lorakit.adapter.attach import attach
from lorakit.adapter.config import LoRAConfig
from lorakit.adapter.prompt_config import PromptConfig
from lorakit.adapter.starts import Starts
from lorakit.adapter.value import Adapter
from lorakit.core.layer import base_parameters
from lorakit.errors import RunError
from lorakit.files import atomic_folder, read_safetensors
from lorakit.gguf_cache import quiet
from lorakit.training.config import TrainConfig
from lorakit.training.events import ModelReady
from lorakit.training.verify import weights_checksum

ADAPTER_NAME = "default"
_MODEL_FILE = "model.safetensors"


class Subject(Protocol):
    """What is trained, inside the model.

    Attributes:
        tensors: by stable names, the trainable parameters.
        fixed: by stable names, what belongs to it and is not trained.
        output_side: which of `tensors` LoRA+ trains at its own rate.
        prompt_side: which of `tensors` are a soft prompt's.
        changes_at_once: whether the model is another one before the first step already.
    """

    tensors: Mapping[str, torch.nn.Parameter]
    fixed: Mapping[str, torch.Tensor]
    output_side: AbstractSet[str]
    prompt_side: AbstractSet[str]
    changes_at_once: bool

    def untrained(self) -> AbstractContextManager[None]:
        """Within the block, before any step, the model is the base."""
        ...

    def save(self, target: Path, tokenizer: Any) -> None:
        """Write it, with tokenizer and chat template, as one folder, whole or not at all."""
        ...

    def check_base(self) -> bool:
        """Whether all that was not to be trained is as it was."""
        ...

    def check_saved(self, saved: Path) -> bool:
        """Whether what `save` wrote is what the model holds, read back."""
        ...

    def saved_bytes(self, saved: Path) -> int:
        """Size of the weights that `save` wrote."""
        ...

    def ready(self, config: TrainConfig) -> ModelReady:
        """What is to be told of it."""
        ...


class TrainedAdapter:
    """An adapter, attached and active; the base stays as it is."""

    def __init__(
        self, model: Any, beginning: LoRAConfig | Starts, prompt: PromptConfig, tokenizer: Any, seed: int
    ) -> None:
        self._model = model
        self._adapters = attach(model, beginning, ADAPTER_NAME, prompt=prompt, tokenizer=tokenizer, seed=seed)
        self._base_before = weights_checksum(model)
        self.tensors: Mapping[str, torch.nn.Parameter] = self._adapters.trainable_tensors(ADAPTER_NAME)
        self.fixed: Mapping[str, torch.Tensor] = self._adapters.fixed_tensors(ADAPTER_NAME)
        self.output_side: AbstractSet[str] = self._adapters.output_side(ADAPTER_NAME)
        self.prompt_side: AbstractSet[str] = self._adapters.prompt_side(ADAPTER_NAME)
        config = beginning.config if isinstance(beginning, Starts) else beginning
        self.changes_at_once = bool(self.prompt_side) or config.begins_with_update

    def untrained(self) -> AbstractContextManager[None]:
        """As `Subject`."""
        return self._adapters.disabled()

    def save(self, target: Path, tokenizer: Any) -> None:
        """As `Subject`: in PEFT's format."""
        with atomic_folder(target) as building:
            self._adapters.save(ADAPTER_NAME, building)
            tokenizer.save_pretrained(building)

    def check_base(self) -> bool:
        """As `Subject`: by a checksum over every bit of the base."""
        return weights_checksum(self._model) == self._base_before

    def check_saved(self, saved: Path) -> bool:
        """As `Subject`.

        Raises:
            AdapterFileError: it cannot be read back.
        """
        return Adapter.load(saved).digest() == self._adapters.extract(ADAPTER_NAME).digest()

    def saved_bytes(self, saved: Path) -> int:
        """As `Subject`: of one part or two."""
        return sum(file.stat().st_size for file in saved.rglob("adapter_model.safetensors"))

    def ready(self, config: TrainConfig) -> ModelReady:
        """As `Subject`."""
        summary = self._adapters.summary()
        own = summary["adapters"][ADAPTER_NAME]
        return ModelReady(
            parameters=summary["base_parameters"],
            dtype=config.dtype,
            storage=config.quantize,
            products=config.frozen_products,
            device=config.device,
            layers=own["layers"],
            ranks=tuple(own["ranks"]),
            trained=own["parameters"],
            virtual_tokens=own["virtual_tokens"],
        )


class TrainedModel:
    """Every weight of the model."""

    changes_at_once = False

    def __init__(self, model: Any) -> None:
        self._model = model
        self.fixed: Mapping[str, torch.Tensor] = {}
        self.output_side: AbstractSet[str] = frozenset()
        self.prompt_side: AbstractSet[str] = frozenset()
        self.tensors: Mapping[str, torch.nn.Parameter] = base_parameters(model)
        for tensor in self.tensors.values():
            if tensor.dtype != torch.float32:
                raise RunError(
                    f"full fine-tuning moves weights by less than {tensor.dtype} can hold: use --dtype fp32 (or auto)"
                )
            tensor.requires_grad_(True)

    def untrained(self) -> AbstractContextManager[None]:
        """As `Subject`: before any step, it is."""
        return contextlib.nullcontext()

    def save(self, target: Path, tokenizer: Any) -> None:
        """As `Subject`: as transformers saves models, in one file of fp32."""
        with atomic_folder(target) as building, quiet(progress_bars=False):
            self._model.save_pretrained(building, max_shard_size="1TB")
            tokenizer.save_pretrained(building)

    def check_base(self) -> bool:
        """As `Subject`: nothing was to stay."""
        return True

    def check_saved(self, saved: Path) -> bool:
        """As `Subject`."""
        found, _ = read_safetensors(saved / _MODEL_FILE)
        own = {name: tensor.detach().cpu() for name, tensor in self._model.state_dict().items()}
        return all(torch.equal(tensor, own[name]) for name, tensor in found.items())

    def saved_bytes(self, saved: Path) -> int:
        """As `Subject`."""
        return (saved / _MODEL_FILE).stat().st_size

    def ready(self, config: TrainConfig) -> ModelReady:
        """As `Subject`."""
        number = sum(tensor.numel() for tensor in self.tensors.values())
        return ModelReady(
            parameters=number,
            dtype=config.dtype,
            storage=config.quantize,
            products="exact",
            device=config.device,
            layers=0,
            ranks=(),
            trained=number,
        )


def subject_of(model: Any, config: TrainConfig, beginning: LoRAConfig | Starts, tokenizer: Any) -> Subject:
    """What `config` trains, put in place in a model just loaded; an adapter begins with `beginning`, its soft prompt as
    a text maybe, read by `tokenizer`.

    Raises:
        TargetError: the adapter's config names what is not in the model, or the model takes no soft prompt.
        RunError: full fine-tuning in another dtype than fp32.
    """
    if config.method == "full":
        return TrainedModel(model)
    return TrainedAdapter(model, beginning, config.prompt, tokenizer, config.seed)
