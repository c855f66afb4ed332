"""Presets: words for what to adapt, and which layers each means in a model.

They are found by what stands in the model, not by a table of architectures: what the modules around a layer are called
(a class or a name with "attention" in it), widths that fit together (a feed-forward network leads from d to f and back
from f, or from half of a fused 2 f, to d), a list of n equal networks beside a matrix with n outputs (experts and what
chooses among them). Works on the meta device. Knows no ranks and no adapters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import nn

from lorakit.adapter.config import PRESETS
from lorakit.core import experts
from lorakit.core.layer import AdaptedModule, base_modules
from lorakit.core.sites import ConvolutionSite, is_attention, is_linear, site_of

_ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)
_FEED_FORWARD = re.compile(r"mlp|ffn|feed_?forward", re.IGNORECASE)


def members(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, tuple[str, ...]]:
    """What each preset means in a model: paths of layers and, of stacked experts, full names of parameters.

    Args:
        model: as a whole.
        modules: those that count, by path, without what adapters hold.

    Returns:
        For every word of `PRESETS`, in the model's order; empty where the model has none of that.
    """
    head = output_head(model)
    linear = {path: module for path, module in modules.items() if is_linear(module) and module is not head}
    apart, stacks = _experts(modules)
    attention = {path for path in linear if _is_in_attention(path, modules)}
    feed_forward = _feed_forward({path: m for path, m in linear.items() if path not in attention}, modules)
    of_experts = [path for path in feed_forward if path.startswith(apart)]
    tokens = input_embeddings(model)
    found = {
        "all-linear": list(linear),
        "attention": [path for path in linear if path in attention],
        "mlp": [path for path in feed_forward if path not in of_experts],
        "experts": [*of_experts, *stacks],
        "embeddings": [
            path
            for path, module in modules.items()
            if (module in tokens or module is head) and site_of(module) is not None
        ],
        "convolutions": [
            path
            for path, module in modules.items()
            if isinstance(site_of(module), ConvolutionSite) and not _is_depthwise(module)
        ],
    }
    return {word: tuple(found[word]) for word in PRESETS}


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that makes a language model's logits (which "all-linear" leaves out), if the model names one."""
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None


def input_embeddings(model: nn.Module) -> list[nn.Module]:
    """The embedding of a model's tokens; all its embeddings where it does not say which that is."""
    getter = getattr(model, "get_input_embeddings", None)
    try:
        named = getter() if callable(getter) else None
    except NotImplementedError:  # transformers' way to say that there is none
        named = None
    found: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return found if named is None else [module for module in found if module is named]


# ---------------------------------------------------------------- attention and feed-forward


def _is_in_attention(path: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the innermost of the modules around a layer that says what it is (or the layer's own name) says
    attention.
    """
    if is_attention(modules[path]):
        return True
    for said in _said(path, modules):
        if _FEED_FORWARD.search(said):
            return False
        if _ATTENTION.search(said):
            return True
    return False


def _said(path: str, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """What a layer and the modules around it are called, innermost first: the layer's name, then class and name of
    each module but the model itself, whose class may say anything.
    """
    parent, _, name = path.rpartition(".")
    yield name
    while parent:
        if parent in modules:
            yield _class_of(modules[parent]).__name__
        parent, _, name = parent.rpartition(".")
        yield name


def _class_of(module: nn.Module) -> type:
    return type(module).__bases__[1] if isinstance(module, AdaptedModule) else type(module)


def _feed_forward(linear: Mapping[str, nn.Module], modules: Mapping[str, nn.Module]) -> list[str]:
    """Those of the layers outside of attention that lead from d to f and back: what is neither a router (whose outputs
    nothing takes back to d) nor a pooler (which has one width) nor a projection of another kind of mixer.
    """
    plain = {path: layer for path, layer in linear.items() if not _of_another_mixer(path, modules)}
    widths = {path: _widths(layer) for path, layer in plain.items()}
    there = set(widths.values())
    named = {path for path in plain if any(_FEED_FORWARD.search(said) for said in _said(path, modules))}

    def pairs(path: str) -> bool:
        fan_in, fan_out = widths[path]
        if fan_in == fan_out:
            return path in named  # a network as wide as its input is seen by its name alone
        back = {(fan_out, fan_in), (fan_out, 2 * fan_in)}  # of a layer that leads up, fused with its gate or not
        up = {(fan_out // 2, fan_in)} if fan_out % 2 == 0 and fan_out // 2 != fan_in else set()
        return bool(there & (back | up))

    return [path for path in plain if pairs(path)]


def _of_another_mixer(path: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether what holds a layer computes with parameters of its own or a convolution: a state space, a recurrence."""
    holder = modules.get(path.rpartition(".")[0])
    if holder is None or any(_FEED_FORWARD.search(said) for said in _said(path, modules)):
        return False
    own = any(parameter is not None for parameter in holder._parameters.values())
    return own or any(isinstance(child, nn.modules.conv._ConvNd) for child in holder.children())


def _widths(layer: nn.Module) -> tuple[int, int]:
    """(inputs, outputs)."""
    site = site_of(layer)
    assert site is not None, "it is linear"
    rows = site.rows(layer.get_parameter(site.weight_name))
    return rows.shape[1], rows.shape[0]


def _is_depthwise(layer: nn.Module) -> bool:
    """Whether each channel has a kernel of its own: no matrix, so nothing that low rank could save."""
    assert isinstance(layer, nn.modules.conv._ConvNd), "it has a ConvolutionSite"
    return layer.groups > 1 and layer.groups == layer.in_channels


# ---------------------------------------------------------------- experts


def _experts(modules: Mapping[str, nn.Module]) -> tuple[tuple[str, ...], list[str]]:
    """Beginnings of paths of layers in experts that are modules, and full names of experts' stacked parameters."""
    apart: list[str] = []
    stacks: list[str] = []
    for path, module in modules.items():
        for name, child in module.named_children():
            where = f"{path}.{name}" if path else name
            if where not in modules:
                continue
            if isinstance(child, nn.ModuleList | nn.ModuleDict):
                kinds = {type(each) for each in child.children()}
                if len(child) > 1 and len(kinds) == 1 and _chosen(module, child, len(child)):
                    apart.append(f"{where}.")
            elif (keeps := experts.keeps_contract(child)) or _is_stack(module, child):
                names = experts.weight_names(child)
                stacks += [f"{where}.{each}" for each in names if keeps or child.get_parameter(each).ndim == 3]
    return tuple(apart), stacks


def _is_stack(mixture: nn.Module, child: nn.Module) -> bool:
    """Whether a module that is no layer holds three-dimensional parameters, a matrix for each expert of a mixture."""
    if site_of(child) is not None or isinstance(child, nn.modules.conv._ConvNd):
        return False
    sizes = {len(p) for p in child._parameters.values() if p is not None and p.ndim == 3}
    return len(sizes) == 1 and _chosen(mixture, child, sizes.pop())


def _chosen(mixture: nn.Module, among: nn.Module, number: int) -> bool:
    """Whether a matrix of the mixture, outside of its experts, has an output for each of them."""
    inside = set(among.modules())
    return any(
        parameter is not None and parameter.ndim == 2 and len(parameter) == number
        for _, module in base_modules(mixture)
        if module not in inside and not isinstance(module, nn.Embedding)
        for parameter in module._parameters.values()
    )
