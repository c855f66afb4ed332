"""What a soft prompt is made of: `PromptConfig`. Imports no torch, so the command line can read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import pydantic

from lorakit.config import Config

# what papers and other libraries call them
_KINDS = {
    "prompt_tuning": "prompt",
    "prefix_tuning": "prefix",
    "p_tuning_v2": "prefix",
    "ptuning_v2": "prefix",
    "ptuning": "p_tuning",
}
_INITS = {"sample_vocab": "vocabulary"}


def _spelled(known: Mapping[str, str]) -> pydantic.BeforeValidator:
    def read(value: Any) -> Any:
        if not isinstance(value, str):
            return "none" if value is False else value  # as YAML reads a bare no
        name = value.casefold().replace("-", "_")
        return known.get(name, name)

    return pydantic.BeforeValidator(read)


@dataclass(frozen=True, kw_only=True)
class PromptConfig(Config):
    """Virtual tokens that stand before every row, and what is trained for them."""

    aliases: ClassVar[Mapping[str, str]] = {
        "num_virtual_tokens": "virtual_tokens",
        "prompt_tuning_init": "prompt_init",
        "prompt_tuning_init_text": "prompt_text",
        "encoder_reparameterization_type": "prompt_encoder",
        "encoder_hidden_size": "encoder_hidden",
        "encoder_num_layers": "encoder_layers",
    }
    switches: ClassVar[Mapping[str, tuple[str, Any, Any]]] = {"prefix_projection": ("prompt_encoder", "mlp", "none")}
    advice: ClassVar[Mapping[str, str]] = {
        "tokenizer_name_or_path": "leave it out: the text is read by the model's own tokenizer",
        "token_dim": "leave it out: sizes are seen from the model",
        "num_transformer_submodules": "leave it out: it is seen from the model",
        "encoder_dropout": "not in this version",
    }

    soft_prompt: Annotated[Literal["none", "prompt", "prefix", "p_tuning"], _spelled(_KINDS)] = "none"
    """A soft prompt trained with the adapter, or, with target_modules none, alone. prompt (arXiv 2104.08691):
    embeddings of virtual tokens before every row. prefix (2101.00190; P-tuning v2, 2110.07602): their keys and values
    in every layer. p_tuning (2103.10385): embeddings that an encoder makes."""

    virtual_tokens: int = 20
    """Of a soft prompt: how many; they take that much of the model's context."""

    prompt_init: Annotated[Literal["auto", "text", "vocabulary", "random", "zero"], _spelled(_INITS)] = "auto"
    """How virtual tokens begin. text: as the tokens of prompt_text, over and over or cut. vocabulary: as tokens drawn
    from the vocabulary. A prefix takes the keys and values that these tokens have in the base. random: normal, as wide
    as the base's embeddings; a prefix with deviation 1. zero: for a prefix. auto: text where there is one; random with
    an encoder; else vocabulary."""

    prompt_text: str | None = None
    """The text for prompt_init text."""

    prompt_encoder: Annotated[Literal["auto", "none", "mlp", "lstm"], _spelled({})] = "auto"
    """Network that makes the virtual tokens while they are trained; only what it makes is saved. none: they are trained
    themselves. mlp: for a prefix (its reparametrisation) and p_tuning. lstm: for p_tuning. auto: mlp for p_tuning, else
    none."""

    encoder_hidden: int | None = None
    """Width of the encoder; None: that of what it is given."""

    encoder_layers: int = 2
    """Layers of the LSTM."""

    @property
    def is_prefix(self) -> bool:
        """Whether virtual tokens are keys and values."""
        return self.soft_prompt == "prefix"

    @property
    def in_rows(self) -> int:
        """How many virtual tokens go through the model with every row; none of a prefix do."""
        return self.virtual_tokens if self.soft_prompt in ("prompt", "p_tuning") else 0

    @property
    def in_context(self) -> int:
        """How many tokens of the context virtual tokens take."""
        return 0 if self.soft_prompt == "none" else self.virtual_tokens

    @property
    def encoder(self) -> Literal["none", "mlp", "lstm"]:
        """`prompt_encoder` without auto."""
        if self.prompt_encoder == "auto":
            return "mlp" if self.soft_prompt == "p_tuning" else "none"
        return self.prompt_encoder

    @property
    def init(self) -> Literal["text", "vocabulary", "random", "zero"]:
        """`prompt_init` without auto."""
        if self.prompt_init != "auto":
            return self.prompt_init
        return "text" if self.prompt_text is not None else "random" if self.encoder != "none" else "vocabulary"

    def problems(self) -> list[str]:
        """Ranges, and settings at odds with each other."""
        found = []
        if self.virtual_tokens < 1:
            found.append(f"virtual_tokens: must be at least 1 (got {self.virtual_tokens})")
        if self.encoder_hidden is not None and self.encoder_hidden < 1:
            found.append(f"encoder_hidden: must be at least 1 (got {self.encoder_hidden})")
        if self.encoder_layers < 1:
            found.append(f"encoder_layers: must be at least 1 (got {self.encoder_layers})")
        if self.soft_prompt == "none":
            plain = PromptConfig.__dataclass_fields__
            changed = [name for name, field in plain.items() if getattr(self, name) != field.default]
            return found + [
                f"{name}: has no meaning without soft_prompt; set it to prompt or prefix" for name in changed
            ]
        allowed = {"prompt": ("none",), "prefix": ("none", "mlp"), "p_tuning": ("none", "mlp", "lstm")}[
            self.soft_prompt
        ]
        if self.encoder not in allowed:
            found.append(
                f"prompt_encoder: soft_prompt {self.soft_prompt} takes {' or '.join(allowed)} (got {self.encoder})"
            )
        if self.init == "text" and not self.prompt_text:
            found.append("prompt_init: text needs prompt_text, the text to begin with")
        if self.prompt_text is not None and self.init != "text":
            found.append(f"prompt_text: is not looked at with prompt_init {self.init}; leave one of them out")
        if self.init == "zero" and not self.is_prefix:
            found.append("prompt_init: zero is for soft_prompt prefix; choose vocabulary, text or random")
        if self.encoder != "none" and self.init in ("text", "vocabulary"):
            found.append(f"prompt_init: an encoder begins with random numbers, not with {self.init}")
        return found
