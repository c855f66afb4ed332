"""The frozen trunk, run once: where only upper layers are trained, what enters the first of them is the same in every
epoch, so it is computed once for each row, kept in memory or in a file, and steps and evaluations begin there.

The model's own forward runs as ever; only its lower layers are passed over: the first returns what is kept, the others
what they are given. What is kept is found by a row's tokens, of which it is a function: causal attention, no dropout.
Before anything is trained, a micro-batch must give the same logits both ways. Knows no losses and no optimiser.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorakit import machine
from lorakit.data.batches import plan_evaluation, read_ids
from lorakit.data.chat import Example
from lorakit.errors import ConfigError
from lorakit.files import SafetensorsWriter, open_safetensors
from lorakit.fusion import decoder_layers, fused
from lorakit.packing import collated, draws, packed_attention, packed_logits, settings_that_draw
from lorakit.packing.attention import LAYOUT
from lorakit.packing.layout import Layout, Row
from lorakit.report import size

_FILE = ".tmp-trunk"  # in the run folder; `files.remove_leftovers` knows it, should a run be killed
_COMPARED = 128  # places at which logits are compared
_Forward = Callable[..., Any]


@dataclass(frozen=True)
class Trunk:
    """What can be kept of a model.

    Attributes:
        layers: how many decoder layers lie below the first that is trained.
        tokens: of all different rows.
        nbytes: of the hidden states of these tokens.
    """

    layers: int
    tokens: int
    nbytes: int


def trunk_of(model: nn.Module, examples: Sequence[Example]) -> Trunk:
    """What can be kept of a model, which may be a skeleton, with its adapter attached.

    Raises:
        ConfigError: nothing can be; says what was found.
    """
    name = type(model).__name__
    layers = decoder_layers(model)
    if layers is None:
        raise _refused(f"{name} has no decoder layers where transformers usually has them, under <prefix>.layers")
    count = min(_first_trained(model, layers), len(layers) - 1)
    if count == 0:
        raise _refused(f"layer 0 of {name} is trained, so no layer below is the same in every epoch; name upper ones")
    upper = {id(module) for part in (*list(layers)[count:], *_behind(model)) for module in part.modules()}
    drawing = [path for path, module in model.named_modules() if draws(module) and id(module) not in upper]
    drawing += settings_that_draw(model)
    if drawing:
        raise _refused(f"{name} draws anew in each step below its trained layers ({', '.join(drawing[:5])})")
    embedding = _embedding(model).weight
    tokens = sum(len(ids) for ids in _different(examples).values())
    return Trunk(count, tokens, tokens * embedding.shape[1] * embedding.element_size())


def refuse_too_large(trunk: Trunk, folder: Path | None) -> None:
    """Go on if there is room for what is to be kept, in memory or in a folder.

    Raises:
        ConfigError: there is not.
    """
    room = machine.available_memory() if folder is None else shutil.disk_usage(folder).free
    if room is not None and trunk.nbytes > room:
        instead = "set cache_trunk to disk, or leave it off" if folder is None else "leave cache_trunk off"
        raise ConfigError(
            f"cache_trunk: what {trunk.layers} layers put out for {trunk.tokens:,} tokens takes {size(trunk.nbytes)}, "
            f"more than the {size(room)} that are free {'in memory' if folder is None else f'in {folder}'}; {instead}"
        )


@contextlib.contextmanager
def kept_trunk(
    model: Any, examples: Sequence[Example], *, folder: Path | None, micro_batch_tokens: int
) -> Iterator[None]:
    """While entered, `packed_logits(model, ...)` of these examples passes over the layers below the trained ones.

    Args:
        model: a causal language model with its adapter attached; it must pack rows. It has its own code again
            afterwards, whatever is raised.
        examples: all that will come, training and validation rows.
        folder: where a file is made that is removed again in the end; None keeps all in memory.
        micro_batch_tokens: most tokens that go through the trunk at once.

    Raises:
        ConfigError: nothing can be kept of this model (`trunk_of`); or it does not give the same logits in this way.
    """
    trunk = trunk_of(model, examples)
    longest = max(len(example.ids) for example in examples)
    with contextlib.ExitStack() as stack:
        with _evaluating(model), fused(model), packed_attention(model, longest) as packs:
            if not packs:
                raise _refused(f"rows of {type(model).__name__} cannot be packed")
            states = stack.enter_context(_states(model, trunk, examples, folder, micro_batch_tokens))
            _compare(model, trunk, examples, states, micro_batch_tokens)
        stack.enter_context(_passed_over(model, trunk, states))
        yield


def _refused(reason: str) -> ConfigError:
    return ConfigError(f"cache_trunk: {reason}; leave cache_trunk off")


def _embedding(model: Any) -> nn.Embedding:
    embedding: nn.Embedding = model.get_input_embeddings()
    return embedding


def _base(model: nn.Module) -> nn.Module:
    """What holds the decoder layers."""
    base: nn.Module = getattr(model, str(model.base_model_prefix))
    return base


def _behind(model: Any) -> list[nn.Module]:
    """What comes after the decoder layers: the last norm and the head."""
    found = (model.get_output_embeddings(), getattr(_base(model), "norm", None))
    return [module for module in found if isinstance(module, nn.Module)]


def _first_trained(model: Any, layers: nn.ModuleList) -> int:
    """Number of the first decoder layer with something trained; of one behind the last, if nothing in them is.

    Raises:
        ConfigError: something is trained that may come before the layers.
    """
    numbers = {id(p): number for number, layer in enumerate(layers) for p in layer.parameters()}
    numbers |= {id(p): len(layers) for module in _behind(model) for p in module.parameters()}
    numbers |= {id(p): -1 for p in _embedding(model).parameters()}  # a head that is tied to it trains it too
    trained = {name: numbers.get(id(p), -1) for name, p in model.named_parameters() if p.requires_grad}
    before = [name for name, number in trained.items() if number < 0]
    if before:
        raise _refused(
            f"{before[0]} of {type(model).__name__} is trained, which is neither in a decoder layer nor the norm or "
            "the head behind them"
        )
    return min(trained.values(), default=len(layers))


# ---------------------------------------------------------------- what is kept


def _name(ids: Sequence[int] | torch.Tensor) -> str:
    """What the states of a row are kept under: a hash of its tokens."""
    return hashlib.blake2b(torch.as_tensor(ids, dtype=torch.int64).cpu().numpy().data, digest_size=16).hexdigest()


def _different(examples: Sequence[Example]) -> dict[str, list[int]]:
    """What the model reads of each row, equal ones once, by name."""
    return {_name(ids): ids for ids in map(read_ids, examples)}


@contextlib.contextmanager
def _states(
    model: Any, trunk: Trunk, examples: Sequence[Example], folder: Path | None, micro_batch_tokens: int
) -> Iterator[Mapping[str, torch.Tensor]]:
    """The hidden states (n, d) of each row that enter the first trained layer, by name."""
    by_name = {_name(read_ids(example)): example for example in examples}
    names, rows = list(by_name), list(by_name.values())
    lengths = [len(read_ids(row)) for row in rows]
    plan = plan_evaluation(lengths, micro_batch_tokens=micro_batch_tokens)

    def computed() -> Iterator[tuple[str, torch.Tensor]]:
        for indices in plan:
            found = _computed(model, trunk, rows, indices)
            for i in indices:
                yield names[i], found[i]

    if folder is None:
        yield dict(computed())
        return
    path, embedding = folder / _FILE, _embedding(model).weight
    order = [i for indices in plan for i in indices]
    try:
        path.unlink(missing_ok=True)
        layout = {names[i]: (embedding.dtype, (lengths[i], embedding.shape[1])) for i in order}
        with SafetensorsWriter(path, layout) as file:
            for name, state in computed():
                file.write(name, state)
        with open_safetensors(path) as states:
            yield states
    finally:
        path.unlink(missing_ok=True)


@torch.no_grad()
def _computed(model: Any, trunk: Trunk, rows: Sequence[Example], indices: Sequence[int]) -> dict[int, torch.Tensor]:
    """The hidden states of some rows, each (n, d), on the CPU."""
    batch = collated(model, rows, indices, share=True).to(_embedding(model).weight.device)
    seen: list[torch.Tensor] = []

    def see(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(hidden_states)
        return hidden_states

    first, *upper = list(decoder_layers(model) or ())[trunk.layers :]
    with _forwards({first: see, **dict.fromkeys(upper, _as_given)}), _understood(model):
        # what comes out is not read: one place of it is the least that can be asked for
        packed_logits(model, replace(batch, predict=batch.predict[:1], source=None))
    embedding = _embedding(model).weight
    shape, dtype = (1, len(batch.ids), embedding.shape[1]), embedding.dtype
    if len(seen) != 1 or seen[0].shape != shape or seen[0].dtype != dtype:
        raise _refused(f"layer {trunk.layers} of {type(model).__name__} is not given one {dtype} tensor of {shape}")
    hidden = seen[0][0].cpu()  # (T, d)
    return {i: hidden[row.places] for i, row in zip(batch.rows, Layout(batch.lengths, batch.forks).rows, strict=True)}


# ---------------------------------------------------------------- passing over


@contextlib.contextmanager
def _passed_over(model: Any, trunk: Trunk, states: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Let the layers below the trained ones give what is kept."""
    lowest, *lower = list(decoder_layers(model) or ())[: trunk.layers]
    entering: list[torch.Tensor] = []

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids, layout = kwargs["input_ids"][0], kwargs[LAYOUT]
        entering[:] = [_gathered(states, ids.cpu(), layout.rows).to(ids.device, non_blocking=True)]

    def kept(*args: Any, **kwargs: Any) -> torch.Tensor:
        return entering.pop()[None]

    with _forwards({lowest: kept, **dict.fromkeys(lower, _as_given)}):
        hook = _base(model).register_forward_pre_hook(enter, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


def _gathered(states: Mapping[str, torch.Tensor], ids: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """Hidden states (T, d) of the rows of a micro-batch with tokens `ids` (T,), each token's where it lies."""
    found = [states[_name(ids[row.places])] for row in rows]
    hidden = found[0].new_empty(len(ids), found[0].shape[1])
    for row, state in zip(rows, found, strict=True):
        hidden[row.own] = state[len(row.places) - len(row.own) :]
    return hidden


def _as_given(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return hidden_states


@contextlib.contextmanager
def _forwards(changes: Mapping[nn.Module, _Forward]) -> Iterator[None]:
    """Let modules compute by other functions."""
    before = {module: vars(module).get("forward") for module in changes}
    for module, forward in changes.items():
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        for module, forward_before in before.items():
            if forward_before is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = forward_before


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextlib.contextmanager
def _understood(model: nn.Module) -> Iterator[None]:
    """A model whose layers are called in another way than Llama's is refused by name.

    Raises:
        ConfigError: it is such a model.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, KeyError, ValueError, IndexError, AttributeError) as error:
        raise _refused(
            f"layers of {type(model).__name__} cannot be passed over ({type(error).__name__}: {str(error)[:200]})"
        ) from error


@torch.no_grad()
def _compare(
    model: Any,
    trunk: Trunk,
    examples: Sequence[Example],
    states: Mapping[str, torch.Tensor],
    micro_batch_tokens: int,
) -> None:
    """A micro-batch must give the same logits with the trunk and without.

    Raises:
        ConfigError: it does not, so more enters the upper layers than was kept.
    """
    lengths = [len(read_ids(example)) for example in examples]
    indices = plan_evaluation(lengths, micro_batch_tokens=micro_batch_tokens)[0]
    batch = collated(model, examples, indices, share=True).to(_embedding(model).weight.device)
    # at some places of all rows: all logits would take most of a run's memory
    some = batch.predict[:: math.ceil(len(batch.predict) / _COMPARED)]
    batch = replace(batch, predict=some, source=None)
    with _passed_over(model, trunk, states), _understood(model):
        found = packed_logits(model, batch).float()
    expected = packed_logits(model, batch).float()
    tolerance = 1e-3 if _embedding(model).weight.dtype == torch.float32 else 5e-2  # of rounding, as packing's probe has
    if found.shape != expected.shape or not (found - expected).abs().max() <= tolerance * expected.abs().max():
        raise _refused(
            f"{type(model).__name__} gives other logits when its first {trunk.layers} layers are passed over: more "
            "than hidden states goes from them to the upper ones"
        )
