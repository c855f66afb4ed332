"""PEFT's configs: `LoraConfig` with PEFT's fields, which becomes a `LoRAConfig` once the model is known."""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import nn

from lorakit.adapter.config import LoRAConfig
from lorakit.adapter.naming import names_alone
from lorakit.adapter.patterns import matching
from lorakit.compat.peft.errors import PeftValueError, UnsupportedError
from lorakit.compat.peft.tying import named, tie, trainable_tokens
from lorakit.core.layer import base_modules
from lorakit.errors import ConfigError, bullet_list, nearest
from lorakit.files import read_json, write_json
from lorakit.formats.peft import CONFIG_FILE
from lorakit.formats.peft_nested import ADDS_TWICE

__version__ = ADDS_TWICE
"""The PEFT whose names and files these are."""


DRAWN_OR_FROM_WEIGHT = re.compile(r"(?i:gaussian|orthogonal|olora|pissa(_niter_\d+)?)")
"""The strings that `init_lora_weights` may be here."""


class TaskType(enum.StrEnum):
    """What the model is for."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"  # noqa: S105 - no password
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PeftType(enum.StrEnum):
    """The methods lorakit has."""

    LORA = "LORA"


# model_type -> names adapted where a config names none (PEFT's choice: attention's query and value, mostly)
DEFAULT_TARGETS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("t5", "mt5"), ("q", "v")),
    **dict.fromkeys(("bart", "opt", "gptj", "gpt_neo", "llama", "llama4", "mistral", "mixtral"), ("q_proj", "v_proj")),
    **dict.fromkeys(("stablelm", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), ("q_proj", "v_proj")),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "layoutlm"), ("query", "value")),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    **dict.fromkeys(("bloom", "gpt_neox", "chatglm", "falcon"), ("query_key_value",)),
    "deberta-v2": ("query_proj", "value_proj"),
    "deberta": ("in_proj",),
    "mpt": ("Wqkv",),
    "codegen": ("qkv_proj",),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
}


@dataclass
class PeftConfig:
    """What all PEFT configs have. `PeftConfig.from_pretrained(folder)` gives the `LoraConfig` that is in it."""

    task_type: str | None = None
    peft_type: str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    is_prompt_learning: ClassVar[bool] = False
    is_adaption_prompt: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.task_type is not None and self.task_type not in list(TaskType):
            raise ConfigError(f"Invalid task type: {self.task_type!r}; there are {', '.join(TaskType)}")
        self.peft_version = self.peft_version or __version__

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON has them."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {key: sorted(value) if isinstance(value, set) else value for key, value in plain.items()}

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Write adapter_config.json into the folder; the hub is never asked."""
        folder = Path(save_directory)
        if folder.is_file():
            raise AssertionError(f"{folder} is a file, a folder is needed")  # as PEFT's users know it
        write_json(folder / CONFIG_FILE, self.to_dict())

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """Read adapter_config.json from a folder, or from the hub where no such folder exists."""
        from lorakit.compat.peft.files import adapter_folder

        folder = adapter_folder(pretrained_model_name_or_path, subfolder, **kwargs)
        return cls.from_peft_type(**cls.from_json_file(folder / CONFIG_FILE))

    @classmethod
    def from_json_file(cls, path_json_file: str | Path, **_: Any) -> dict[str, Any]:
        """The file's object as a dict."""
        values = read_json(Path(path_json_file))
        if not isinstance(values, dict):
            raise ConfigError(f"{path_json_file}: expected an object, found {type(values).__name__}")
        values.pop("runtime_config", None)  # of one run
        return values

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftConfig:
        """The config of the class that `peft_type` names (without it: of this class).

        Raises:
            UnsupportedError: another method than LoRA.
            ConfigError: a key this version does not know holds a value that is not off: it may change the adapter.
        """
        kind = kwargs.get("peft_type", PeftType.LORA if cls is not PeftConfig else None)
        if kind not in (PeftType.LORA, None):
            raise UnsupportedError(f"peft_type is {kind!r}; this version has LORA")
        made = LoraConfig if kind == PeftType.LORA else cls
        known = {field.name for field in dataclasses.fields(made)}
        unknown = {key: value for key, value in kwargs.items() if key not in known and not _off(value)}
        if unknown:
            raise ConfigError(f"Unexpected keyword arguments {sorted(unknown)} for {made.__name__}: not known here")
        return made(**{key: value for key, value in kwargs.items() if key in known})


def _off(value: Any) -> bool:
    return value is None or value is False or value == {} or value == [] or value == ""


@dataclass
class LoraConfig(PeftConfig):
    """PEFT's settings of a LoRA adapter, under PEFT's names and with PEFT's defaults."""

    r: int = 8
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: dict[str, Any] = dataclasses.field(default_factory=dict)
    eva_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    use_dora: bool = False
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: Any = None
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: Any = None
    arrow_config: Any = None
    velora_config: Any = None
    monteclora_config: Any = None
    kasa_config: Any = None
    ensure_weight_tying: bool = False

    unsupported: ClassVar[tuple[str, ...]] = (
        *("megatron_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
        *("use_qalora", "layer_replication"),
        *("use_bdlora", "arrow_config", "velora_config", "monteclora_config", "kasa_config"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LORA
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list | tuple):
                setattr(self, name, set(value))
        if isinstance(self.target_parameters, str):
            raise TypeError("`target_parameters` must be a list of strings or None.")
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"`{name}` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("When `layers_pattern` is specified, `layers_to_transform` must also be specified. ")
        if self.lora_bias and not isinstance(self.init_lora_weights, bool):
            raise ConfigError(
                "The argument lora_bias=True is only supported with init_lora_weights=True or False, got "
                f"init_lora_weights={self.init_lora_weights} instead."
            )
        if self.lora_bias and self.use_dora:
            raise ConfigError("The argument lora_bias=True is not supported for DoRA, please pass use_dora=False")
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}

    def to_dict(self) -> dict[str, Any]:
        """All fields but those of one run, as JSON has them."""
        values = super().to_dict()
        values.pop("runtime_config")
        return values

    # ------------------------------------------------------------ from and to lorakit

    def resolved(self, model: nn.Module, *, fresh: bool = True) -> LoRAConfig:
        """What this config means for `model`. Where it names no modules, the model's defaults are written into it.

        Args:
            model: the base.
            fresh: an adapter is to be made; else its tensors exist, and how they began does not matter.

        Raises:
            UnsupportedError: a feature this version has not.
            ConfigError: a value out of range.
            PeftValueError: no modules are named and the model's type has no defaults.
        """
        missing = [f"{name}={getattr(self, name)!r}" for name in self.unsupported if not _off(getattr(self, name))]
        init = self.init_lora_weights if fresh else True
        if not isinstance(init, bool) and not DRAWN_OR_FROM_WEIGHT.fullmatch(init):
            missing.append(f"init_lora_weights={self.init_lora_weights!r}")
        if missing:
            raise UnsupportedError(f"this version of lorakit has no support for\n{bullet_list(missing)}")
        if self.target_parameters and self.lora_dropout:
            raise PeftValueError("lora.ParamWrapper does not work with lora_dropout != 0.")
        if self.r <= 0:
            raise ConfigError(f"`r` should be a positive integer value but the value passed is {self.r}")
        if self.target_modules is None:
            self.target_modules = set(_default_targets(model, or_none=bool(self.target_parameters)))
        if fresh or self.ensure_weight_tying:
            tie(self, model)
        if init == "orthogonal" and self.r % 2:
            raise ConfigError(f"Orthogonal initialization requires the LoRA rank to be even, got {self.r} instead.")
        return LoRAConfig(
            r=self.r,
            alpha=self.lora_alpha,
            dropout=self.lora_dropout,
            target_modules=self._targets(model),
            exclude_modules=_listed(self.exclude_modules) or None,
            rank_pattern=dict(self.rank_pattern),
            alpha_pattern=dict(self.alpha_pattern),
            scaling="rslora" if self.use_rslora else "lora",
            delta="dora" if self.use_dora else "lora",
            init="random" if init is False else "default" if init is True else init,
            bias=self._bias(model),  # type: ignore[arg-type]
            lora_bias=self.lora_bias,
            modules_to_save=tuple(self.modules_to_save or ()),
            target_parameters=tuple(self.target_parameters or ()),
            alora_invocation_tokens=tuple(self.alora_invocation_tokens or ()),
            trainable_tokens=trainable_tokens(
                model,
                self.trainable_token_indices,
                saved=self.modules_to_save or (),
                ensure=self.ensure_weight_tying,
            ),
        )

    def nothing_left(self, model: nn.Module) -> str:
        """What PEFT says where this config leaves no module of `model` to adapt; empty where it leaves one."""
        paths = [path for path, _ in base_modules(model) if path]

        def meant(names: Iterable[str] | str | None) -> set[str]:
            if isinstance(names, str):
                return set(paths if names == "all-linear" else matching(names, paths, "names"))
            return set(named(names or (), paths))

        saved = meant(self.modules_to_save)
        saved |= {path for path in paths if any(path.startswith(f"{one}.") for one in saved)}
        excluded = saved | meant(self.exclude_modules)
        matched = meant(self.target_modules)
        parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        if matched - excluded or named(self.target_parameters or (), parameters):
            return ""
        if not self.target_modules and self.target_parameters is not None:
            return (
                "No `target_modules` passed but also no `target_parameters` found. Please check the values for these "
                "arguments."
            )
        if set(paths) == excluded:
            return (
                "All modules were excluded. This is likely unintended. Check your `target_modules`, `exclude_modules` "
                "and `modules_to_save` configuration."
            )
        if not excluded:
            return f"Target modules {self.target_modules} not found in the base model."
        return (
            "No modules were targeted for adaptation. This might be caused by a combination of mismatched target "
            "modules and excluded modules."
        )

    def _bias(self, model: nn.Module) -> str:
        if self.bias not in ("none", "all", "lora_only"):
            raise UnsupportedError(f"Requested bias: {self.bias}, is not implemented; none, all and lora_only are")
        # a Llama has no biases; PEFT's users ask for "all" of them all the same, and get none
        some = any(isinstance(module._parameters.get("bias"), nn.Parameter) for _, module in base_modules(model))
        return self.bias if some else "none"

    def _targets(self, model: nn.Module) -> str | tuple[str, ...]:
        targets = names_alone(_listed(self.target_modules))
        if self.layers_to_transform is None:
            return targets
        layers = (
            {self.layers_to_transform} if isinstance(self.layers_to_transform, int) else {*self.layers_to_transform}
        )
        blocks = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or [r"[^.]*"]
        numbered = [re.compile(rf"(?:^|.*?\.){block}\.(\d+)\.") for block in blocks]
        config = LoRAConfig(target_modules=targets, exclude_modules=_listed(self.exclude_modules) or None)
        from lorakit.adapter.targets import find_targets

        paths = [target.path for target in find_targets(model, config).layers]
        chosen = [p for p in paths if any((m := n.match(p)) and int(m[1]) in layers for n in numbered)]
        if not chosen:
            raise PeftValueError(
                f"Target modules {sorted(targets)} not found in layers {sorted(layers)} of the base model; "
                f"matched by name: {', '.join(paths[:5])}"
            )
        return tuple(chosen)

    @classmethod
    def of(cls, config: LoRAConfig, **values: Any) -> Self:
        """The config of an adapter that lorakit made, in PEFT's names; `values` are set besides."""
        targets, excluded = config.target_modules, config.exclude_modules
        return cls(
            r=config.r,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=targets if isinstance(targets, str) else set(targets),
            exclude_modules=excluded if isinstance(excluded, str) or excluded is None else set(excluded),
            rank_pattern=dict(config.rank_pattern),
            alpha_pattern=dict(config.alpha_pattern),
            layers_to_transform=list(config.layers) if config.layers else None,
            use_rslora=config.scaling == "rslora",
            use_dora=config.delta == "dora",
            bias=config.bias,
            lora_bias=config.lora_bias,
            modules_to_save=list(config.modules_to_save) or None,
            target_parameters=list(config.target_parameters) or None,
            trainable_token_indices=list(config.trainable_tokens) or None,
            alora_invocation_tokens=list(config.alora_invocation_tokens) or None,
            **values,
        )


def _listed(names: Iterable[str] | str | None) -> str | tuple[str, ...]:
    return names if isinstance(names, str) else tuple(sorted(names or ()))


def _default_targets(model: nn.Module, *, or_none: bool) -> tuple[str, ...]:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in DEFAULT_TARGETS or or_none:
        return DEFAULT_TARGETS.get(kind or "", ())
    last = sorted({path.rsplit(".", 1)[-1] for path, module in base_modules(model) if hasattr(module, "weight")})
    guess = nearest("q_proj", last) or last[:8]
    raise PeftValueError(
        f"Please specify `target_modules` in `peft_config`: there is no default for {kind or type(model).__name__}; "
        f'"all-linear" is every linear layer, or name some of {", ".join(guess)}'
    )
