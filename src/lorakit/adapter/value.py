"""An adapter as a value: a config, factors by module path, whole tensors. No model in memory, no file format known."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import nn

from lorakit.adapter.config import LoRAConfig
from lorakit.adapter.prompt_config import PromptConfig
from lorakit.core import lowrank
from lorakit.core.dora import dense_delta
from lorakit.core.prompts import KeyValues
from lorakit.errors import AdapterError, bullet_list, nearest

if TYPE_CHECKING:
    from lorakit.adapter.spectrum import Spectrum

Kind = Literal["matrix", "embedding", "convolution", "attention", "experts"]
TAKES_BIAS = ("matrix", "convolution")
"""Kinds of layers whose B may have a bias (`LoRAConfig.lora_bias`)."""
TAKES_MAGNITUDE = ("matrix", "embedding", "convolution")
"""Kinds of layers that DoRA adapts."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Factors:
    """The update of one layer: s B A, and where B has a bias, s times that for the layer's output; or DoRA's.

    Attributes:
        A: (r, in); (r, in / groups, *kernel) for a convolution; (experts, r, in) for stacked experts.
        B: (out, r); (out, r / groups, 1, ...) for a convolution; (experts, out, r) for stacked experts.
        alpha: numerator of the scale.
        kind: how the layer multiplies: by a matrix, by looking rows up, by convolving, by one of the two matrices of a
        MultiheadAttention, or by one matrix of a stack for each token.
        bias: (out,), B's: the update of an output is s (B A x + bias). All layers of an adapter have one, or none has
        (`LoRAConfig.lora_bias`).
        magnitude: (out,), the length of each output's row of W + s B A, which makes it DoRA: all layers of an adapter
        have one, or none has (`LoRAConfig.delta`).
    """

    A: torch.Tensor
    B: torch.Tensor
    alpha: float
    kind: Kind = "matrix"
    bias: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None

    @property
    def r(self) -> int:
        """Rank."""
        return self.A.shape[1 if self.kind == "experts" else 0]

    @property
    def rank_shares(self) -> int:
        """Among how many matrices `r` is divided: the groups of a convolution. Every expert has the whole of it."""
        return 1 if self.kind == "experts" else self.r // self.B.shape[1]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(outputs, inputs) of an update as a matrix; a convolution's kernel counts with the inputs, an embedding has
        its vocabulary for inputs, and of experts it is one's.
        """
        first = 1 if self.kind == "experts" else 0
        return self.B.shape[first], math.prod(self.A.shape[first + 1 :])

    @property
    def is_zero(self) -> bool:
        """Whether it changes nothing. (A magnitude's start is the base's, which is not known here.)"""
        return not (self.A.any() and self.B.any()) and (self.bias is None or not self.bias.any())

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its tensors by the names `Adapter.tensors` has after the path: A, B, B.bias, magnitude."""
        named = {"A": self.A, "B": self.B, "B.bias": self.bias, "magnitude": self.magnitude}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def to(self, dtype: torch.dtype) -> Factors:
        """The same in another dtype."""
        bias, magnitude = (None if t is None else t.to(dtype) for t in (self.bias, self.magnitude))
        return replace(self, A=self.A.to(dtype), B=self.B.to(dtype), bias=bias, magnitude=magnitude)

    def times(self, factor: float) -> Factors:
        """The same update times `factor`, carried by B and its bias."""
        return replace(self, B=self.B * factor, bias=None if self.bias is None else self.bias * factor)

    def blocks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors as stacks of matrices (`lowrank.blocks`), one a group or expert: A (n, r, columns), B (n, out, r)
        with the `r` that each has.
        """
        return (self.A, self.B) if self.kind == "experts" else lowrank.blocks(self.A, self.B)

    def delta(self, scaling: str, weight: torch.Tensor | None = None) -> torch.Tensor:
        """The update in fp32, s B A or DoRA's: (out, in); (vocabulary, dim) for an embedding; (out, in / groups,
        *kernel) for a convolution; (experts, out, in) for stacked experts, however the model lays them (gpt-oss has
        (experts, in, out)). The bias is no part of it.

        Args:
            scaling: of the adapter's config.
            weight: DoRA's alone: the base's, in the layout of the result.

        Raises:
            AdapterError: DoRA, and no weight is given.
        """
        s = lowrank.scale(self.alpha, self.r, scaling)
        if self.magnitude is not None:
            if weight is None:
                raise AdapterError("a DoRA update depends on the base's weight: delta(path, weight=W) gives it")
            rows = weight.T if self.kind == "embedding" else weight.flatten(1)
            dense = dense_delta(rows, self.A, self.B, s, self.magnitude).float()
            return dense.T if self.kind == "embedding" else dense.reshape(weight.shape)
        if self.kind == "convolution":
            return lowrank.convolution_delta(self.A.float(), self.B.float(), s)
        dense = lowrank.matrix_delta(self.A.float(), self.B.float(), s)
        return dense.T if self.kind == "embedding" else dense


NO_LAYERS = LoRAConfig(target_modules="none")
"""The config of an adapter that is a soft prompt alone."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """A soft prompt: p virtual tokens.

    Attributes:
        config: what it was made with. An encoder has done its work: what it made is here.
        values: (p, d) embeddings; of a prefix (p, layers * 2 * heads * width), as `core.prompts.SoftPrompt` has them.
        key_values: how a prefix is divided; else None.
    """

    config: PromptConfig
    values: torch.Tensor
    key_values: KeyValues | None = None

    @property
    def length(self) -> int:
        """p."""
        return len(self.values)

    def __str__(self) -> str:
        return f"{self.length} virtual tokens ({self.config.soft_prompt})"

    def problems(self) -> list[str]:
        """What cannot be a soft prompt."""
        shape, found = tuple(self.values.shape), []
        if self.values.ndim != 2 or 0 in shape or shape[0] != self.config.virtual_tokens:
            found.append(f"prompt: values {shape} for {self.config.virtual_tokens} virtual tokens")
        if self.config.is_prefix != (self.key_values is not None):
            found.append(f"prompt: soft_prompt {self.config.soft_prompt} and key_values {self.key_values}")
        elif self.key_values is not None and self.values.ndim == 2 and shape[1] != self.key_values.numbers:
            found.append(f"prompt: values {shape}, and {self.key_values} has {self.key_values.numbers} a token")
        return found


@dataclass(frozen=True, kw_only=True)
class BaseInfo:
    """Which base an adapter was made on; what `attach` checks.

    Attributes:
        name: Hub id, path or alias under which lorakit finds it; None for a model of unknown origin.
        architecture: class name of the model.
        dtype: dtype of most of its weights, e.g. "bfloat16".
        structure: SHA-256 over names and shapes of all base parameters.
        samples: a few hundred weights at places that follow from the names, in fp32, rounded to 8 digits.
        published: under which other tools find it, or what it was made from: `name`, but the Hub id behind an alias.
        storage: how its weights were held: "none" (in a floating-point dtype), "blocks" (of a GGUF file, the same
        numbers), "int8" or "nf4" (other numbers than those of the model it was made of).
    """

    name: str | None
    architecture: str
    dtype: str
    structure: str
    samples: tuple[float, ...]
    published: str | None = None
    storage: str = "none"


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """A low-rank adapter held in memory.

    Attributes:
        config: what it was made with.
        factors: module path -> low-rank update.
        biases: module path -> trained bias (the whole bias, not a difference).
        replaced: full parameter name, e.g. "classifier.weight" -> trained tensor (`modules_to_save`).
        tokens: module path of an embedding -> (n, dim) rows trained whole, those of `config.trainable_tokens`.
        prompt: a soft prompt, if it has one.
        base: the base it was made on, if known.
        metadata: strings kept in the file, e.g. the version that wrote it.
    """

    config: LoRAConfig
    factors: Mapping[str, Factors] = field(default_factory=dict)
    biases: Mapping[str, torch.Tensor] = field(default_factory=dict)
    replaced: Mapping[str, torch.Tensor] = field(default_factory=dict)
    tokens: Mapping[str, torch.Tensor] = field(default_factory=dict)
    prompt: Prompt | None = None
    base: BaseInfo | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        ranks = sorted({f.r for f in self.factors.values()})
        rank = "-".join(map(str, dict.fromkeys((ranks[0], ranks[-1])))) if ranks else "none"
        prompt = f", {self.prompt}" if self.prompt is not None else ""
        return f"Adapter({len(self.factors)} layers, r={rank}{prompt}, {self.nbytes / 1e6:.1f} MB)"

    @classmethod
    def load(
        cls, path: str | Path, *, format: str | None = None, model: nn.Module | None = None, alpha: float | None = None
    ) -> Adapter:
        """Read an adapter folder or file of any format lorakit reads, strictly.

        Args:
            path: file or folder.
            format: its format; None: recognised from names and headers.
            model: the base (on the meta device will do), for formats whose names make sense only with it.
            alpha: numerator of the scale, for formats that do not store it.

        Raises:
            AdapterFileError: missing, damaged, or not an adapter; lists everything that is wrong.
        """
        from lorakit.formats import BaseFacts, Context, load_adapter

        base = None if model is None else BaseFacts.of(model)
        return load_adapter(path, format=format, context=Context(base=base, alpha=alpha))

    def save(self, path: str | Path, format: str = "peft", *, model: nn.Module | None = None) -> Path:
        """Write the adapter in `format` and return what was written: a folder for PEFT's, else mostly a file.

        Args:
            path: where to.
            format: a name in `lorakit.formats.CODECS`.
            model: the base (on the meta device will do), for formats whose names make sense only with it.

        Raises:
            AdapterFileError: the format cannot carry this adapter; nothing is written.
        """
        from lorakit.formats import BaseFacts, Context, save_adapter

        base = None if model is None else BaseFacts.of(model)
        return save_adapter(self, path, format=format, context=Context(base=base))

    def scale(self, path: str) -> float:
        """The factor before B A of the layer at `path`."""
        f = self._factors_of(path)
        return lowrank.scale(f.alpha, f.r, self.config.scaling)

    def delta(self, path: str, weight: torch.Tensor | None = None) -> torch.Tensor:
        """The dense fp32 update of the weight of the layer at module path `path`, scale included (shapes:
        `Factors.delta`); where B has a bias, the layer's output changes by `scale(path) * factors[path].bias` besides.

        Args:
            path: of the layer.
            weight: for DoRA, whose update depends on it: the base's, in the layout of the result.

        Raises:
            AdapterError: no such layer in this adapter, or the weight is missing.
        """
        return self._factors_of(path).delta(self.config.scaling, weight)

    def _factors_of(self, path: str) -> Factors:
        if path not in self.factors:
            guess = nearest(path, self.factors)
            raise AdapterError(
                f"no layer {path!r} in this adapter" + (f"; nearest: {', '.join(guess)}" if guess else "")
            )
        return self.factors[path]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by a plain name: "<path>.A", ".B", ".B.bias", ".magnitude", ".bias" (the layer's own),
        ".tokens", or the parameter's own name; "prompt" for a soft prompt's.
        """
        named = {f"{path}.{name}": t for path, f in self.factors.items() for name, t in f.tensors().items()}
        named |= {f"{path}.bias": bias for path, bias in self.biases.items()}
        named |= {f"{path}.tokens": rows for path, rows in self.tokens.items()}
        named |= {} if self.prompt is None else {"prompt": self.prompt.values}
        return named | dict(self.replaced)

    def digest(self) -> str:
        """SHA-256 of the content (tensors, scales); the identity of the adapter whatever its name or file."""
        hasher = hashlib.sha256()
        for path in sorted(self.factors):
            f = self.factors[path]
            hasher.update(f"{path}|{f.kind}|{lowrank.scale(f.alpha, f.r, self.config.scaling)!r}\n".encode())
        if self.config.alora_invocation_tokens:
            hasher.update(f"from {list(self.config.alora_invocation_tokens)} on\n".encode())
        if self.tokens:
            hasher.update(f"{list(self.config.trainable_tokens)}\n".encode())
        if self.prompt is not None:
            hasher.update(f"{self.prompt.config.soft_prompt}|{self.prompt.key_values}\n".encode())
        for name, tensor in sorted(self.tensors().items()):
            hasher.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}\n".encode())
            hasher.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return hasher.hexdigest()

    def without_prompt(self) -> Self:
        """What of it is weights: the same without its soft prompt.

        Raises:
            AdapterError: nothing would be left.
        """
        if self.config.target_modules == "none":
            raise AdapterError(f"the adapter is a soft prompt alone ({self.prompt}): without it nothing is left")
        return replace(self, prompt=None)

    def prompt_alone(self) -> Adapter:
        """Its soft prompt, for the same base.

        Raises:
            AdapterError: it has none.
        """
        if self.prompt is None:
            raise AdapterError("the adapter has no soft prompt")
        return Adapter(config=NO_LAYERS, prompt=self.prompt, base=self.base)

    def require_no_prompt(self, what: str) -> None:
        """Go on with an adapter that is weights alone.

        Raises:
            AdapterError: it has a soft prompt; begins with `what`.
        """
        if self.prompt is not None:
            raise AdapterError(
                f"{what}: works on changes of weights, and the adapter has a soft prompt besides ({self.prompt}); "
                "without_prompt() and prompt_alone() take it apart"
            )

    def scaled(self, factor: float) -> Self:
        """The same adapter with every low-rank update times `factor` (carried by B, so the result holds in any file
        format).

        Raises:
            AdapterError: the adapter holds trained biases or modules, which cannot be scaled without the base, or a
            soft prompt.
        """
        self.require_no_prompt("scaled")
        if self.config.delta == "dora":
            raise AdapterError(
                "cannot scale DoRA's updates without the base; activate it with a weight instead: "
                "handle.activate({name: weight})"
            )
        if self.biases or self.replaced or self.tokens:
            raise AdapterError(
                "cannot scale an adapter with trained biases, token rows or modules_to_save: they are whole tensors, "
                "not updates; activate it with a weight instead: handle.activate({name: weight})"
            )
        return replace(self, factors={path: f.times(factor) for path, f in self.factors.items()})

    def folded(self, *, uniform_rank: bool = False) -> Adapter:
        """The same updates with every scale 1 (alpha = r, carried by B, in fp32): what formats need that know one
        scale, or none.

        Args:
            uniform_rank: also give every layer the largest rank, by rows of zeros in A and columns in B.

        Raises:
            AdapterError: a grouped convolution, whose factors cannot be padded.
        """
        largest = max((f.r for f in self.factors.values()), default=self.config.r)
        factors = {}
        for path, own in self.factors.items():
            f = own.to(torch.float32).times(self.scale(path))
            A, B = f.A, f.B
            rows = 1 if f.kind == "experts" else 0  # the dimension of A along which its rows run
            if uniform_rank and f.r < largest:
                if f.B.shape[rows + 1] != f.r:
                    raise AdapterError(f"{path}: a grouped convolution's rank cannot be padded from {f.r} to {largest}")
                A, B = _padded(A, largest, dim=rows), _padded(B, largest, dim=rows + 1)
            factors[path] = replace(f, A=A, B=B, alpha=float(A.shape[rows]))
        from lorakit.adapter.compress import with_factors

        return with_factors(self, factors)

    def spectrum(self) -> Spectrum:
        """Singular values (scale included), energy, stable and effective rank and norm of every layer's update, from
        the factors.
        """
        from lorakit.adapter.spectrum import spectrum

        return spectrum(self)

    def compress(self, *, rank: int | None = None, energy: float | None = None) -> Adapter:
        """The nearest adapter of lower rank: see `lorakit.adapter.compress.compress`, which also gives the error (it
        stands in `metadata["compressed"]` too).

        Args:
            rank: the same for every layer.
            energy: share of the squared singular values of all layers together that stays; ranks differ per layer.

        Raises:
            AdapterError: neither or both given or out of range, or a grouped convolution that cannot have this rank.
        """
        from lorakit.adapter.compress import compress

        return compress(self, rank=rank, energy=energy).adapter

    def check(self, *, allow_zero: bool = False) -> None:
        """Refuse what cannot be a trained adapter: nothing in it, shapes that do not belong together, NaN or infinity,
        no update at all.

        Args:
            allow_zero: take an adapter whose update is zero everywhere (a fresh one).

        Raises:
            AdapterError: with every problem found.
        """
        problems = []
        if not self.tensors():
            problems.append("holds no tensor")
        for path, f in self.factors.items():
            if f.kind == "experts" and (f.A.ndim != 3 or f.B.ndim != 3 or len(f.A) != len(f.B) or not len(f.A)):
                problems.append(f"{path}: A {tuple(f.A.shape)} and B {tuple(f.B.shape)} do not belong together")
                continue
            rank_B = f.B.shape[2 if f.kind == "experts" else 1] if f.B.ndim > 1 else 0
            if f.A.ndim < 2 or rank_B == 0 or f.r % rank_B or (f.kind != "convolution" and rank_B != f.r):
                problems.append(f"{path}: A {tuple(f.A.shape)} and B {tuple(f.B.shape)} do not belong together")
        problems += self._vector_problems()
        problems += [] if self.prompt is None else self.prompt.problems()
        for name, tensor in self.tensors().items():
            if not tensor.is_floating_point():
                if name in self.replaced:  # a buffer, e.g. a batch norm's count
                    continue
                problems.append(f"{name}: holds {tensor.dtype}, not floating-point numbers")
            elif not torch.isfinite(tensor).all():
                problems.append(
                    f"{name}: {int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} values are NaN or infinite"
                )
        problems += [
            f"{path}: {len(rows)} trained rows for {len(self.config.trainable_tokens)} trainable_tokens"
            for path, rows in self.tokens.items()
            if rows.ndim != 2 or len(rows) != len(self.config.trainable_tokens)
        ]
        zero = self.factors and not (self.biases or self.replaced or self.tokens or self.prompt)
        if zero and not allow_zero and all(f.is_zero for f in self.factors.values()):
            problems.append("its update is zero in every layer: it was never trained, or its B was lost")
        if problems:
            raise AdapterError(f"not a sound adapter:\n{bullet_list(problems)}")

    def _vector_problems(self) -> list[str]:
        """Biases of B and magnitudes that are missing, that the config says are not there, or that do not fit B."""
        problems = []
        for path, f in self.factors.items():
            if f.bias is None:
                problems += [f"{path}: B has no bias, which lora_bias says it has"] if self.config.lora_bias else []
            elif not self.config.lora_bias:
                problems.append(f"{path}: B has a bias, which lora_bias=False says it has not")
            elif f.kind not in TAKES_BIAS:
                problems.append(f"{path}: a bias of B is for matrices and convolutions, not for {f.kind}")
            elif f.bias.shape != f.B.shape[:1]:
                shapes = f"B {tuple(f.B.shape)} and its bias {tuple(f.bias.shape)}"
                problems.append(f"{path}: {shapes} do not belong together")
        for path, f in self.factors.items():
            if f.magnitude is None:
                problems += (
                    [f"{path}: has no magnitude, which delta 'dora' needs"] if self.config.delta == "dora" else []
                )
            elif self.config.delta != "dora":
                problems.append(f"{path}: has a magnitude, which delta {self.config.delta!r} has not")
            elif f.kind not in TAKES_MAGNITUDE:
                problems.append(f"{path}: a magnitude is for matrices, embeddings and convolutions, not for {f.kind}")
            elif f.magnitude.shape != f.B.shape[:1]:
                shapes = f"B {tuple(f.B.shape)} and its magnitude {tuple(f.magnitude.shape)}"
                problems.append(f"{path}: {shapes} do not belong together")
        return problems

    def summary(self) -> dict[str, Any]:
        """Layers, virtual tokens, parameters, bytes, ranks: for printing and JSON."""
        return {
            "layers": len(self.factors),
            "virtual_tokens": 0 if self.prompt is None else self.prompt.length,
            "parameters": sum(t.numel() for t in self.tensors().values()),
            "bytes": self.nbytes,
            "ranks": sorted({f.r for f in self.factors.values()}),
        }


def _padded(factor: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    """Zeros added at the end of a dimension up to `size`."""
    shape = list(factor.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([factor, factor.new_zeros(shape)], dim=dim)
