"""What an adapter is made of: `LoRAConfig`. Imports no torch, so the command line can read it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import pydantic

from lorakit.config import Config
from lorakit.errors import nearest

PRESETS = ("all-linear", "attention", "mlp", "embeddings", "experts", "convolutions")
"""Words of `target_modules` that stand for layers by what they are (`adapter/presets.py`)."""

INITS = ("default", "gaussian", "orthogonal", "random", "olora", "pissa", "pissa_niter_16", "eva", "lora_ga", "loftq")
"""Ways to begin; of `pissa_niter_` with any number of passes."""
FROM_WEIGHT = frozenset({"olora", "pissa", "lora_ga"})
"""Ways that begin with a part of the base's weight, so that the update counts from there (`pissa_niter_N` besides)."""
FROM_DATA = frozenset({"eva", "lora_ga"})
"""Ways that look at training rows first."""
FOUND_OUT = FROM_DATA | {"loftq"}
"""Ways of which the factors are found out before they are attached: from rows, or from what the base was made of."""
ON_PURPOSE = frozenset({"random", "loftq"})
"""Ways of which the update is not zero at the start."""
_NITER = re.compile(r"pissa_niter_\d+")

# as PEFT writes them
_INIT = pydantic.BeforeValidator(
    lambda value: "default" if value is True else value.casefold() if isinstance(value, str) else value
)
_ALONE = pydantic.BeforeValidator(
    lambda value: (
        value[0] if isinstance(value, list | tuple) and tuple(value) in (("all-linear",), ("none",)) else value
    )
)
_NONE_IS_EMPTY = pydantic.BeforeValidator(lambda value: () if value is None else value)


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(Config):
    """Which layers get an update, of what rank and scale, and how it starts.

    The update of a layer with weight W (out, in) is ``s * B @ A`` with A (r, in), B (out, r); ``s = alpha / r`` (LoRA,
    arXiv 2106.09685) or ``alpha / sqrt(r)`` (rsLoRA, arXiv 2312.03732). With `lora_bias` B has a bias c (out,), and
    what is added to the output for an input x is ``s * (B @ A @ x + c)``.
    """

    aliases: ClassVar[Mapping[str, str]] = {
        "lora_r": "r",
        "rank": "r",
        "lora_alpha": "alpha",
        "lora_dropout": "dropout",
        "lora_target_modules": "target_modules",
        "layers_to_transform": "layers",
        "init_lora_weights": "init",
        "peft_init_lora_weights": "init",
        "trainable_token_indices": "trainable_tokens",
    }
    switches: ClassVar[Mapping[str, tuple[str, Any, Any]]] = {
        "use_rslora": ("scaling", "rslora", "lora"),
        "use_dora": ("delta", "dora", "lora"),
    }
    advice: ClassVar[Mapping[str, str]] = {
        "loftq_config": "leave it out: init loftq is all there is to say",
        "pissa_init": "set init to pissa, or to pissa_niter_16 for the fast one",
        "pissa_iter": "set init to pissa_niter_16, with the number of passes at its end",
        "eva_config": "set eva_rho",
        "lora_ga_config": "set lora_ga_gamma",
        "fan_in_fan_out": "leave it out: how a layer stores its weight is seen from the layer",
        "task_type": "leave it out: it is seen from the model",
        "lora_target_linear": "leave it out: target_modules is all-linear unless you set it",
    }

    r: int = 16
    """Rank: columns of B, rows of A."""

    alpha: float = 32.0
    """Numerator of the scale."""

    dropout: float = 0.0
    """Probability of dropping an input element of A while training."""

    target_modules: Annotated[str | tuple[str, ...], _ALONE] = "all-linear"
    """What to adapt: presets, names, or both in a list; or one regular expression that must match whole paths. Presets:
    all-linear (every matrix-multiplying layer but the output head; not the stacked weights of experts), attention, mlp
    (feed-forward layers, those of shared experts too), experts (of a mixture: modules or stacked weights), embeddings
    (of tokens, and the output head), convolutions (but depthwise ones); lorakit targets shows them. Names are matched
    against the end of module paths (q_proj, self_attn.q_proj). A MultiheadAttention means both its projections;
    exclude_modules takes one out. none: no layer, for a soft prompt alone."""

    target_parameters: Annotated[tuple[str, ...], _NONE_IS_EMPTY] = ()
    """Stacked weights of experts (3-D parameters, one matrix an expert), and other parameters of two or three
    dimensions: names matched against the end of parameter names, e.g. "mlp.experts.gate_up_proj". The weight of a plain
    layer is cheaper to adapt by `target_modules`. With these, `target_modules` may be empty."""

    exclude_modules: str | tuple[str, ...] | None = None
    """Layers (and parameters of `target_parameters`) to leave out: names, or a regular expression."""

    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Rank per layer: a name matched against the end of module paths, or a regular expression for it -> r."""

    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """alpha per layer, as `rank_pattern`."""

    layers: tuple[int, ...] | None = None
    """Adapt only these layer numbers (the first number in a module path: model.layers.3.mlp -> 3)."""

    scaling: Literal["lora", "rslora"] = "lora"
    """alpha/r or alpha/sqrt(r)."""

    delta: Literal["lora", "dora"] = "lora"
    """How the update is parametrised. lora: W + s B A. dora (arXiv 2402.09353): that with every output's row made as
    long as a trained magnitude says, which starts at the length of W's own; not for MultiheadAttention and experts."""

    init: Annotated[str, _INIT] = "default"
    """How A and B begin; the model computes the same before the first step with all but random and loftq. default: A
    uniform(+-1/sqrt(fan_in)), B zero. gaussian: A normal(0, 1/r), B zero. orthogonal: A and B from one orthogonal r x r
    matrix (r even). random: B like A, so that the update is not zero; for tests. olora (arXiv 2406.01775): from a QR
    decomposition of the weight. pissa (arXiv 2404.02948): its leading singular directions; pissa_niter_16: the same,
    nearly, in less time. eva (arXiv 2410.07170): A from the inputs of each layer on training rows, B zero. lora_ga
    (arXiv 2407.05000): from the gradient of each weight on training rows. loftq (arXiv 2310.08659): B A
    makes up for what quantising the base lost, as far as the rank goes."""

    eva_rho: float = 2.0
    """init eva: the largest rank a layer may get is `r` times this; ranks go where inputs vary in more directions, and
    their sum stays. 1: every layer keeps `r`."""

    lora_ga_gamma: float = 16.0
    """init lora_ga: the larger, the smaller the factors begin."""

    lora_fa: bool = False
    """Train B alone and keep A as it began (LoRA-FA, arXiv 2308.03303): half the optimiser's state, and no layer keeps
    its input for the backward pass on the adapter's account."""

    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained with the adapter: none, all of the model's, or those of adapted layers."""

    lora_bias: bool = False
    """Give each B a bias of its own, zero at the start, scaled with the update and stored with it (PEFT's `lora_bias`);
    the layer's bias stays frozen. Layers that have none can be adapted, not merged. Not for embeddings,
    MultiheadAttention and experts; init must be default or random."""

    modules_to_save: Annotated[tuple[str, ...], _NONE_IS_EMPTY] = ()
    """Modules (matched as `target_modules`) trained whole and stored with the adapter, e.g. a classification head."""

    trainable_tokens: Annotated[tuple[int, ...], _NONE_IS_EMPTY] = ()
    """Token ids whose rows of the input embedding are trained whole (and, where the head is tied to it, of the head):
    for new tokens, at n x d parameters instead of the whole embedding's."""

    alora_invocation_tokens: Annotated[tuple[int, ...], _NONE_IS_EMPTY] = ()
    """Activated LoRA (arXiv 2504.12397): token ids with which the adapter is invoked. It counts in each row from the
    start of their last occurrence on; before, and in rows without, there is the base alone, whose keys and values can
    be shared. For layers that multiply each token by a matrix, the output head not among them; not to be merged."""

    @property
    def from_start(self) -> bool:
        """Whether the update counts from where A and B begin, a part of the base's weight."""
        return self.init in FROM_WEIGHT or _NITER.fullmatch(self.init) is not None

    @property
    def begins_with_update(self) -> bool:
        """Whether the adapted model is not the base before the first step."""
        return self.init in ON_PURPOSE

    def problems(self) -> list[str]:
        """Ranges."""
        found = []
        if any(token < 0 for token in self.trainable_tokens):
            found.append(f"trainable_tokens: must be token ids from 0 (got {min(self.trainable_tokens)})")
        if len(set(self.trainable_tokens)) < len(self.trainable_tokens):
            found.append("trainable_tokens: names a token twice")
        if self.init not in INITS and not _NITER.fullmatch(self.init):
            guess = nearest(self.init, INITS)
            hint = f"did you mean {' or '.join(guess)}?" if guess else f"there are {', '.join(INITS)}"
            found.append(f"init: unknown {self.init!r}; {hint}")
        if not 1 <= self.eva_rho < math.inf:
            found.append(f"eva_rho: must be at least 1 (got {self.eva_rho})")
        if not 0 < self.lora_ga_gamma < math.inf:
            found.append(f"lora_ga_gamma: must be positive (got {self.lora_ga_gamma})")
        if self.r < 1:
            found.append(f"r: must be at least 1 (got {self.r})")
        if not math.isfinite(self.alpha) or self.alpha <= 0:
            found.append(f"alpha: must be a positive number (got {self.alpha})")
        if not 0 <= self.dropout < 1:
            found.append(f"dropout: must be in [0, 1) (got {self.dropout})")
        found += [f"rank_pattern[{k!r}]: must be at least 1 (got {v})" for k, v in self.rank_pattern.items() if v < 1]
        found += [f"alpha_pattern[{k!r}]: must be positive (got {v})" for k, v in self.alpha_pattern.items() if v <= 0]
        if self.target_modules == "none":
            others = ("target_parameters", "exclude_modules", "layers", "rank_pattern", "alpha_pattern")
            beside = [name for name in (*others, "modules_to_save", "trainable_tokens") if getattr(self, name)]
            beside += ["bias"] if self.bias != "none" else []
            found += [
                f"{name}: has no meaning with target_modules none; name layers, or leave it out" for name in beside
            ]
        if not self.target_modules and not self.target_parameters:
            found.append(f"target_modules: is empty; name layers or presets ({', '.join(PRESETS)})")
        if self.lora_bias and self.init not in ("default", "random"):
            found.append(
                f"lora_bias: goes with init 'default' or 'random', the only ones with which PEFT reads such an adapter "
                f"(got init {self.init!r})"
            )
        if self.lora_bias and self.delta == "dora":
            found.append(
                "lora_bias: not with delta 'dora', where it would be scaled with the rows (PEFT has no such file)"
            )
        if any(token < 0 for token in self.alora_invocation_tokens):
            found.append(f"alora_invocation_tokens: must be token ids (got {min(self.alora_invocation_tokens)})")
        if self.alora_invocation_tokens:
            for_all = {
                "delta dora": self.delta == "dora",
                "bias": self.bias != "none",
                "modules_to_save": bool(self.modules_to_save),
                "trainable_tokens": bool(self.trainable_tokens),
            }
            found += [
                f"alora_invocation_tokens: not with {name}, which would change the tokens before the invocation too"
                for name, given in for_all.items()
                if given
            ]
        if self.layers is not None and (not self.layers or min(self.layers) < 0):
            found.append(f"layers: must be layer numbers from 0 (got {list(self.layers)})")
        return found
