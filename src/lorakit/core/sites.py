"""How a layer multiplies. A Site knows, for one kind of layer, which of its parameters multiplies, the shapes of A and
B, how an input goes through them, and what dense weight they make. It knows nothing of scales, dropout or which adapter
is active.

An adapter names each weight by a path. Most layers have one weight, called `weight`, and the layer's path names it. Two
kinds of module multiply by several:

- `nn.MultiheadAttention` at `attn`: `attn` is its packed input projection (one matrix, as PEFT has it), `attn.out_proj`
  its output projection, a child module with a path of its own, which however is not called: `attn` reads its weight.
- stacked experts at `experts`: each stack is a parameter, so its own full name is its path, `experts.gate_up_proj`; and
  so with any other parameter. No module can have that path, so the two kinds never collide, and a configuration names
  them in a list of its own.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lorakit.core import lowrank
from lorakit.errors import TargetError


class Site:
    """Base of all sites. Stateless: one instance serves every layer of its kind."""

    kind = "matrix"  # how the factors lie in files: matrix, embedding, convolution, attention or experts
    bias_dim = -1  # dimension of the output along which a bias runs
    weight_name = "weight"  # the parameter that multiplies

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """The layer's weight as (outputs, columns); a view where it can be."""
        return weight

    def unrows(self, matrix: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Undo `rows`: (outputs, columns) in the layout of the layer's `weight`."""
        return matrix

    def matrices(self, weight: torch.Tensor, groups: int) -> torch.Tensor:
        """The layer's weight as the matrices that B A is added to: (groups, outputs / groups, columns), a view where it
        can be.
        """
        rows = self.rows(weight)
        return rows.reshape(groups, -1, rows.shape[1])

    def shapes(self, layer: Any, r: int, path: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B for rank `r`.

        Raises:
            TargetError: this layer cannot carry that rank.
        """
        raise NotImplementedError

    def down(self, layer: Any, x: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        """The input through A: what the layer would do with A for its weight and no bias."""
        raise NotImplementedError

    def up(self, layer: Any, h: torch.Tensor, B: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The result of `down` through B, plus `bias` (out,)."""
        raise NotImplementedError

    def dense(self, A: torch.Tensor, B: torch.Tensor, s: float) -> torch.Tensor:
        """s B A in the layout of the layer's weight."""
        raise NotImplementedError


class LinearSite(Site):
    """`nn.Linear`: y = x W^T with W (out, in)."""

    def shapes(self, layer: Any, r: int, path: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A (r, in), B (out, r)."""
        out_features, in_features = layer.get_parameter(self.weight_name).shape
        return (r, in_features), (out_features, r)

    def down(self, layer: Any, x: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., r)."""
        return F.linear(x, A)

    def up(self, layer: Any, h: torch.Tensor, B: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """(..., r) -> (..., out)."""
        return F.linear(h, B, bias)

    def dense(self, A: torch.Tensor, B: torch.Tensor, s: float) -> torch.Tensor:
        """(out, in)."""
        return lowrank.matrix_delta(A, B, s)


class TransposedLinearSite(LinearSite):
    """transformers' `Conv1D` (GPT-2): y = x W with W (in, out)."""

    def shapes(self, layer: Any, r: int, path: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A (r, in), B (out, r)."""
        in_features, out_features = layer.weight.shape
        return (r, in_features), (out_features, r)

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """(in, out) -> (out, in)."""
        return weight.T

    def unrows(self, matrix: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """(out, in) -> (in, out)."""
        return matrix.T

    def dense(self, A: torch.Tensor, B: torch.Tensor, s: float) -> torch.Tensor:
        """(in, out)."""
        return lowrank.matrix_delta(A, B, s).T


class AttentionInputSite(LinearSite):
    """`nn.MultiheadAttention`'s packed input projection: queries, keys, values are thirds of x W^T with W (3 d, d)."""

    kind = "attention"
    weight_name = "in_proj_weight"


class AttentionOutputSite(LinearSite):
    """`nn.MultiheadAttention`'s output projection, a Linear that the attention does not call."""

    kind = "attention"


class ExpertsSite(Site):
    """A stack of matrices, one an expert, in a module that sends each token to a few of them; its forward is
    `core.experts`'.

    Attributes:
        weight_name: the parameter that is the stack.
        transposed: whether it lies (experts, in, out); else (experts, out, in).
        single: it is one matrix, (out, in): a stack of one in the factors.
    """

    kind = "experts"

    def __init__(self, weight_name: str, *, transposed: bool, single: bool = False) -> None:
        self.weight_name = weight_name
        self.transposed = transposed
        self.single = single

    def shapes(self, layer: Any, r: int, path: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A (experts, r, in), B (experts, out, r)."""
        *stack, out_features, in_features = layer.get_parameter(self.weight_name).shape
        experts = 1 if self.single else stack[0]
        if self.transposed:
            out_features, in_features = in_features, out_features
        return (experts, r, in_features), (experts, out_features, r)

    def matrices(self, weight: torch.Tensor, groups: int) -> torch.Tensor:
        """(experts, out, in), as the factors lie."""
        return weight.unsqueeze(0) if self.single else weight.mT if self.transposed else weight

    def dense(self, A: torch.Tensor, B: torch.Tensor, s: float) -> torch.Tensor:
        """(experts, out, in), (experts, in, out) where transposed, or (out, in) where single."""
        delta = lowrank.matrix_delta(A, B, s)
        return delta[0] if self.single else delta.mT if self.transposed else delta


class EmbeddingSite(Site):
    """`nn.Embedding`: rows of W (vocabulary, dim) by index. A lookup is a product with one-hot rows, so A (r,
    vocabulary), B (dim, r).
    """

    kind = "embedding"

    def shapes(self, layer: Any, r: int, path: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A (r, vocabulary), B (dim, r)."""
        vocabulary, dim = layer.weight.shape
        return (r, vocabulary), (dim, r)

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """(vocabulary, dim) -> (dim, vocabulary)."""
        return weight.T

    def unrows(self, matrix: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """(dim, vocabulary) -> (vocabulary, dim)."""
        return matrix.T

    def down(self, layer: Any, x: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        """Indices (...) -> (..., r). The padding index gets no gradient, as in the layer itself."""
        return F.embedding(x, A.T, padding_idx=layer.padding_idx)

    def up(self, layer: Any, h: torch.Tensor, B: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """(..., r) -> (..., dim), times the factor by which some models (Gemma) scale their embeddings."""
        update = F.linear(h, B, bias)
        return update * layer.embed_scale.to(update) if hasattr(layer, "embed_scale") else update

    def dense(self, A: torch.Tensor, B: torch.Tensor, s: float) -> torch.Tensor:
        """(vocabulary, dim)."""
        return lowrank.matrix_delta(A, B, s).T


class ConvolutionSite(Site):
    """`nn.Conv1d/2d/3d`: A is a convolution of the layer's own geometry onto r channels, B a 1x1 convolution.

    With groups, both are grouped, so that B A is a weight of the layer's shape and can be merged.
    """

    kind = "convolution"
    bias_dim = 1

    def shapes(self, layer: Any, r: int, path: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A (r, in / groups, *kernel), B (out, r / groups, 1, ...)."""
        groups = int(layer.groups)
        out_channels, in_per_group, *kernel = layer.weight.shape
        if r % groups:
            raise TargetError(
                f"{path}: a convolution with {groups} groups needs a rank divisible by {groups} (got {r})"
            )
        return (r, in_per_group, *kernel), (out_channels, r // groups, *[1] * len(kernel))

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """(out, in / groups, *kernel) -> (out, in / groups * kernel)."""
        return weight.flatten(1)

    def unrows(self, matrix: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """(out, in / groups * kernel) -> (out, in / groups, *kernel)."""
        return matrix.view(weight.shape)

    def down(self, layer: Any, x: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        """(N, in, *size) -> (N, r, *size')."""
        padding = layer.padding
        if layer.padding_mode != "zeros":
            x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0
        # PEFT's A reads all input channels whatever the groups; such a file works here too, it just cannot be merged.
        groups = x.shape[-A.ndim + 1] // A.shape[1]
        y: torch.Tensor = _CONVOLUTIONS[A.ndim - 2](x, A, None, layer.stride, padding, layer.dilation, groups)
        return y

    def up(self, layer: Any, h: torch.Tensor, B: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """(N, r, *size') -> (N, out, *size')."""
        y: torch.Tensor = _CONVOLUTIONS[B.ndim - 2](h, B, bias, groups=layer.groups)
        return y

    def dense(self, A: torch.Tensor, B: torch.Tensor, s: float) -> torch.Tensor:
        """(out, in / groups, *kernel)."""
        return lowrank.convolution_delta(A, B, s)


_CONVOLUTIONS: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

LINEAR, TRANSPOSED_LINEAR, EMBEDDING, CONVOLUTION = (
    LinearSite(),
    TransposedLinearSite(),
    EmbeddingSite(),
    ConvolutionSite(),
)
ATTENTION_INPUT, ATTENTION_OUTPUT = AttentionInputSite(), AttentionOutputSite()


def site_of(layer: nn.Module) -> Site | None:
    """The site of a layer, or None where lorakit cannot tell how it multiplies.

    A subclass that overrides `forward` is not its parent: it may scale, gather or quantise, and an update added to its
    output would be wrong without notice. Only the known ones count.
    """
    adapted = layer.__dict__.get("lorakit_site")  # an adapted layer carries its site; its class has a forward of ours
    if adapted is not None:
        return adapted  # type: ignore[no-any-return]
    kind = type(layer)
    if isinstance(layer, nn.MultiheadAttention):
        return ATTENTION_INPUT if is_attention(layer) and layer._qkv_same_embed_dim else None
    if isinstance(layer, nn.Linear):
        if kind is nn.modules.linear.NonDynamicallyQuantizableLinear:  # found in nn.MultiheadAttention only
            return ATTENTION_OUTPUT
        return LINEAR if kind.forward is nn.Linear.forward or _is_falcons(kind) else None
    if isinstance(layer, nn.Embedding):
        plain = kind.forward is nn.Embedding.forward or hasattr(layer, "embed_scale")
        return EMBEDDING if plain and layer.max_norm is None else None  # max_norm rewrites W in its forward
    for convolution in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        if isinstance(layer, convolution):
            return CONVOLUTION if kind.forward is convolution.forward else None
    transformers_utils = sys.modules.get("transformers.pytorch_utils")
    if transformers_utils is not None and kind is transformers_utils.Conv1D:
        return TRANSPOSED_LINEAR
    return None


def _is_falcons(kind: type[nn.Module]) -> bool:
    """Whether a class is the Linear of transformers' Falcon, whose forward writes out the same product."""
    falcon = sys.modules.get("transformers.models.falcon.modeling_falcon")
    return falcon is not None and kind is falcon.FalconLinear


def is_linear(layer: nn.Module) -> bool:
    """Whether "all-linear" means this layer: one that multiplies by a matrix, a MultiheadAttention included."""
    return isinstance(site_of(layer), LinearSite) or is_attention(layer)


def is_attention(layer: nn.Module) -> bool:
    """Whether the layer is torch's MultiheadAttention with torch's own forward (or lorakit's)."""
    plain = type(layer).forward is nn.MultiheadAttention.forward or "lorakit_state" in layer.__dict__
    return isinstance(layer, nn.MultiheadAttention) and plain
