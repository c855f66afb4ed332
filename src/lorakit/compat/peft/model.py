"""`PeftModel` and its task classes: PEFT's wrapper around a model with adapters."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn

from lorakit.compat.peft.card import write_model_card
from lorakit.compat.peft.config import LoraConfig, PeftConfig, __version__
from lorakit.compat.peft.errors import MismatchError, PeftValueError, UnsupportedError
from lorakit.compat.peft.files import adapter_folder, read_adapter
from lorakit.compat.peft.lora_layers import NamedAsInPeft
from lorakit.compat.peft.mixed import generate, routed
from lorakit.compat.peft.tuner import LoraModel
from lorakit.core.layer import base_modules
from lorakit.errors import AdapterMismatchError
from lorakit.files import write_json
from lorakit.formats.peft import CONFIG_FILE


class PeftModel(NamedAsInPeft):
    """A model with LoRA adapters. `base_model` is the tuner, `base_model.model` the model, changed in place.

    Args:
        model: any module with layers that multiply.
        peft_config: of the first adapter.
        adapter_name: its name.
        autocast_adapter_dtype: hold the adapter in fp32 whatever the model's dtype; else in the layers' own.
        low_cpu_mem_usage: leave the adapter on the meta device, for `set_peft_model_state_dict` to fill.
    """

    head_names: ClassVar[tuple[str, ...]] = ()
    """Modules that a task class trains whole, where the model has them."""

    wrapped = "base_model"
    base_model: LoraModel

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        self.base_model = LoraModel.around(model)
        with self.base_model.or_nothing():
            self.add_adapter(adapter_name, peft_config, low_cpu_mem_usage, autocast_adapter_dtype)
        self.base_model.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)
        # transformers has renamed it, and warns of the old name
        renamed = hasattr(type(model), "is_activation_checkpointing")
        if getattr(model, "is_activation_checkpointing" if renamed else "is_gradient_checkpointing", False):
            self.prepare_model_for_gradient_checkpointing(model)

    # ------------------------------------------------------------ which

    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        """Adapter name -> its config."""
        return self.base_model.peft_config

    @property
    def peft_type(self) -> str | None:
        """LORA."""
        return self.active_peft_config.peft_type

    @property
    def active_adapters(self) -> list[str]:
        """Active adapters."""
        return self.base_model.active_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter, or their list."""
        return self.base_model.active_adapter

    @property
    def active_peft_config(self) -> LoraConfig:
        """The config of the first active adapter."""
        return self.peft_config[self.active_adapters[0]]

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of modules that adapters train whole."""
        return {name for config in self.peft_config.values() for name in config.modules_to_save or ()} or None

    def get_base_model(self) -> nn.Module:
        """The model itself, adapters and all."""
        return self.base_model.model

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Use one adapter (or several added up) from now on."""
        self.base_model.set_adapter(adapter_name, inference_mode=inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Whether adapters can be trained."""
        self.base_model.set_requires_grad(adapter_names, requires_grad)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the model is its base, for the thread that runs it; afterwards what it was before, whatever
        is raised. Merged adapters are taken out for as long, for all threads. Layers that were switched off alone are
        on afterwards, as in PEFT.
        """
        handle = self.base_model.handle
        apart = [layer for layer in handle.differing() if "lorakit_off" in layer.__dict__]
        if apart:
            warnings.warn(
                "The model contains some adapter layers that are enabled and others that are disabled. This is most "
                "likely unintentional. After exiting the disable_adapter context, all adapters will be enabled",
                stacklevel=3,
            )
        try:
            with handle.base_alone():
                yield
        finally:
            for layer in apart:
                layer.enable_adapters(True)
                layer.__dict__.pop("lorakit_off")

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add a fresh adapter, inactive and frozen."""
        self._add_heads(peft_config)
        self.base_model.add_adapter(adapter_name, peft_config, low_cpu_mem_usage, autocast_adapter_dtype)

    def _add_heads(self, config: PeftConfig) -> None:
        if self.head_names and isinstance(config, LoraConfig):
            last = {path.rsplit(".", 1)[-1] for path, _ in base_modules(self.get_base_model())}
            heads = [name for name in self.head_names if name in last and name not in (config.modules_to_save or ())]
            config.modules_to_save = [*(config.modules_to_save or ()), *heads] or None

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter out."""
        self.base_model.delete_adapter(adapter_name)

    # ------------------------------------------------------------ run

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The model's forward pass.

        Args:
            *args: the model's.
            adapter_names: one a row of the batch, "__base__" for none; None: the active adapters for all rows.
            **kwargs: the model's.
        """
        with routed(self.base_model, adapter_names, args, kwargs):
            return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The model's `generate`; `adapter_names` as in `forward`, one a prompt, whatever the number of beams."""
        return generate(self.base_model, adapter_names, args, kwargs)

    # ------------------------------------------------------------ numbers

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(parameters that require a gradient, all parameters)."""
        counted = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trained in counted if trained), sum(n for n, _ in counted)

    def print_trainable_parameters(self) -> None:
        """Print both, and their ratio."""
        trained, total = self.get_nb_trainable_parameters()
        print(  # noqa: T201 - what this is for
            f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}"
        )

    def get_layer_status(self) -> Any:
        """`get_layer_status(self)`."""
        from lorakit.compat.peft.status import get_layer_status

        return get_layer_status(self)

    def get_model_status(self) -> Any:
        """`get_model_status(self)`."""
        from lorakit.compat.peft.status import get_model_status

        return get_model_status(self)

    def prepare_model_for_gradient_checkpointing(self, model: Any) -> Any:
        """Let gradients pass through checkpointed blocks although the embeddings are frozen."""
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        elif hasattr(model, "get_input_embeddings"):
            model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_(True))
        return model

    # ------------------------------------------------------------ files

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write adapters: "default" into the folder itself, every other into the folder of its name in it. The hub is
        never asked.

        Args:
            save_directory: the folder.
            safe_serialization: True; pickles are not written.
            selected_adapters: names; None: all.
            save_embedding_layers: "auto" or False; base weights do not belong in an adapter's file.
            is_main_process: whether to write at all.
            path_initial_model_for_weight_conversion: without effect, since the base is never changed: an adapter that
            began as a part of its weight (PiSSA, OLoRA) is always written as a plain one of twice the rank.
            **kwargs: `state_dict` is not supported.
        """
        asked = {
            "safe_serialization=False (a pickle)": not safe_serialization,
            "save_embedding_layers=True (name them in modules_to_save)": save_embedding_layers is True,
            "path_initial_model_for_weight_conversion": path_initial_model_for_weight_conversion is not None
            and not any(self.base_model.handle._resident(name).config.from_start for name in self.peft_config),
            "state_dict": kwargs.get("state_dict") is not None,
        }
        if any(asked.values()):
            raise UnsupportedError(
                f"save_pretrained: not in this version: {', '.join(k for k, v in asked.items() if v)}"
            )
        folder = Path(save_directory)
        if folder.is_file():
            raise PeftValueError(f"{folder} should be a directory, not a file")
        unknown = [name for name in selected_adapters or () if name not in self.peft_config]
        if unknown:
            raise PeftValueError(
                f"You passed an invalid `selected_adapters` arguments, there are {list(self.peft_config)} - got "
                f"{unknown}"
            )
        if not is_main_process:
            return
        for name in self.peft_config if selected_adapters is None else selected_adapters:
            self._save(name, folder if name == "default" else folder / name)
        write_model_card(folder, self)

    def _save(self, name: str, folder: Path) -> None:
        with self.base_model.handle.unfolded():
            adapter = self.base_model.handle.extract(name)
        adapter.save(folder)
        config = self.peft_config[name]
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = getattr(self.get_base_model(), "name_or_path", None) or None
        # how an attention's update lies in the file depends on the version, whatever that of a file read before
        values = {**config.to_dict(), "inference_mode": True, "peft_version": __version__}
        if self.base_model.handle._resident(name).config.from_start:  # which is saved as a plain one
            file = adapter.config
            values |= {"r": file.r, "lora_alpha": file.alpha, "init_lora_weights": True}
            values |= {"rank_pattern": dict(file.rank_pattern), "alpha_pattern": dict(file.alpha_pattern)}
        if config.task_type is None:
            kind = type(self.get_base_model())
            values["auto_mapping"] = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
        write_json(folder / CONFIG_FILE, values)

    def create_or_update_model_card(self, output_dir: str | Path) -> None:
        """Write README.md, or bring its metadata up to date."""
        write_model_card(Path(output_dir), self)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Save into a temporary folder and upload it. Options are `HfApi.upload_folder`'s."""
        from huggingface_hub import HfApi

        token, private = kwargs.pop("token", None), kwargs.pop("private", None)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api = HfApi(token=token)
            api.create_repo(repo_id, private=private, exist_ok=True)
            return api.upload_folder(repo_id=repo_id, folder_path=folder, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        **kwargs: Any,
    ) -> Self:
        """Put a saved adapter on `model` and activate it.

        Args:
            model: the base, changed in place.
            model_id: folder, or repository on the hub.
            adapter_name: its name here.
            is_trainable: whether it can be trained further.
            config: to use in place of the file's.
            autocast_adapter_dtype: as in `PeftModel`.
            **kwargs: `subfolder`, `revision`, `token`; PEFT's options for memory and devices have no effect.

        Raises:
            MismatchError: the file does not fit the model.
        """
        folder = adapter_folder(model_id, kwargs.pop("subfolder", None), **kwargs)
        config = PeftConfig.from_pretrained(folder) if config is None else config
        config.inference_mode = not is_trainable
        if cls is PeftModel:
            cls = TASK_CLASSES.get(config.task_type, PeftModel)  # type: ignore[arg-type, assignment]
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.base_model = LoraModel.around(model)
        with made.base_model.or_nothing():
            made._load(folder, adapter_name, config, autocast_adapter_dtype=autocast_adapter_dtype, **kwargs)
        made.base_model.set_adapter(adapter_name, inference_mode=not is_trainable)
        if not is_trainable:
            made.eval()
        return made

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Load another adapter; it is not activated. Arguments as in `from_pretrained`.

        Returns:
            `missing_keys` and `unexpected_keys`, both empty: what does not fit is an error.
        """
        folder = adapter_folder(model_id, kwargs.pop("subfolder", None), **kwargs)
        config = PeftConfig.from_pretrained(folder)
        config.inference_mode = not is_trainable
        self._load(folder, adapter_name, config, autocast_adapter_dtype=autocast_adapter_dtype, **kwargs)
        self.base_model.set_requires_grad(adapter_name, is_trainable)
        if not is_trainable:
            self.eval()
        return torch.nn.modules.module._IncompatibleKeys([], [])

    def _load(
        self, folder: Path, name: str, config: PeftConfig, *, autocast_adapter_dtype: bool, **kwargs: Any
    ) -> None:
        asked = [key for key in ("key_mapping", "ignore_mismatched_sizes") if kwargs.get(key)]
        if asked:
            raise UnsupportedError(f"not in this version: {', '.join(asked)}")
        assert isinstance(config, LoraConfig), "from_peft_type gives no other"
        try:
            self.base_model.add_value(name, read_adapter(folder), config, autocast_adapter_dtype)
        except AdapterMismatchError as error:
            raise MismatchError(str(error).replace("shape: ", "size mismatch: ")) from error


class PeftModelForCausalLM(PeftModel):
    """A language model with adapters."""


class PeftModelForSeq2SeqLM(PeftModel):
    """An encoder-decoder with adapters."""


class PeftModelForFeatureExtraction(PeftModel):
    """An encoder with adapters."""


class PeftModelForSequenceClassification(PeftModel):
    """A classifier with adapters, which train its head whole."""

    head_names = ("classifier", "score")


class PeftModelForTokenClassification(PeftModel):
    """A token classifier with adapters, which train its head whole."""

    head_names = ("classifier", "score")


class PeftModelForQuestionAnswering(PeftModel):
    """A span finder with adapters, which train its head whole."""

    head_names = ("qa_outputs",)


TASK_CLASSES: dict[str, type[PeftModel]] = {
    "CAUSAL_LM": PeftModelForCausalLM,
    "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
    "FEATURE_EXTRACTION": PeftModelForFeatureExtraction,
    "SEQ_CLS": PeftModelForSequenceClassification,
    "TOKEN_CLS": PeftModelForTokenClassification,
    "QUESTION_ANS": PeftModelForQuestionAnswering,
}
