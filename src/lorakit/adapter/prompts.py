"""Soft prompts and a model: where they go in it, what fits, and how fresh ones begin. Knows not which are in use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorakit.adapter.prompt_config import PromptConfig
from lorakit.adapter.targets import input_embedding
from lorakit.adapter.value import Prompt
from lorakit.core.prompts import KeyValues, LSTMEncoder, SoftPrompt, p_tuning_mlp, prefix_encoder
from lorakit.core.sites import site_of
from lorakit.errors import ConfigError, TargetError


@dataclass(frozen=True)
class PromptPlace:
    """Where a soft prompt goes in a model.

    Attributes:
        path: of the input embedding.
        embedding: it.
        key_values: for a prefix, what each layer keeps of a token; else None.
    """

    path: str
    embedding: nn.Module
    key_values: KeyValues | None

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding: the first id that is free."""
        return self.embedding.get_parameter("weight").shape[0]

    @property
    def width(self) -> int:
        """Numbers of one virtual token."""
        return self.embedding_width if self.key_values is None else self.key_values.numbers

    @property
    def embedding_width(self) -> int:
        """d."""
        return self.embedding.get_parameter("weight").shape[1]

    @property
    def encoder_width(self) -> int:
        """Numbers that an encoder is given for one virtual token: as wide as what one layer keeps as keys, or d."""
        return self.embedding_width if self.key_values is None else self.key_values.heads * self.key_values.width


def place_of(model: nn.Module, config: PromptConfig, modules: Mapping[str, nn.Module]) -> PromptPlace:
    """Where the soft prompt of a config goes.

    Args:
        model: with no adapter in use: a prefix is measured by a pass of one token.
        config: of the prompt.
        modules: all of the model's by path.

    Raises:
        TargetError: the model is no causal language model, its context is shorter than the prompt, or, for a prefix,
            its layers do not all keep plain keys and values of one shape.
    """
    from transformers import PreTrainedModel

    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or not model.can_generate() or model.config.is_encoder_decoder:
        raise TargetError(f"soft_prompt: {name} is no causal language model, the only kind that takes a soft prompt")
    if model.config.get_text_config(decoder=True) is not model.config:
        raise TargetError(f"soft_prompt: {name} reads more than text, which this version gives no soft prompt")
    embedding = input_embedding(model)
    path = next((path for path, module in modules.items() if module is embedding), None)
    if embedding is None or path is None or not isinstance(embedding, nn.Embedding) or site_of(embedding) is None:
        raise TargetError(f"soft_prompt: {name} has no plain input embedding, beside which virtual tokens could stand")
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and config.virtual_tokens >= context:
        raise TargetError(
            f"virtual_tokens: {config.virtual_tokens:,} leave nothing of the context of {context:,} tokens that {name} "
            "has; set fewer"
        )
    key_values = None
    if config.is_prefix:
        layers = _keys_and_values(model, torch.zeros(1, dtype=torch.long))
        key_values = KeyValues(len(layers) // 2, layers[0].shape[0], layers[0].shape[2])
    return PromptPlace(path, embedding, key_values)


@torch.no_grad()
def _keys_and_values(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """What the layers keep of tokens `ids` (n,): keys of the first layer (heads, n, width), its values, keys of the
    second, and so on.

    Raises:
        TargetError: they do not all keep plain keys and values, of one shape.
    """
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    name, training = type(model).__name__, model.training
    weight = model.get_input_embeddings().weight
    model.eval()
    try:
        output = model(input_ids=ids[None].to(weight.device), use_cache=True)
    finally:
        model.train(training)
    cache = output.get("past_key_values")
    layers = [] if cache is None else list(cache.layers)
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    if len(layers) != model.config.num_hidden_layers or not plain:
        kept = ", ".join(sorted({type(layer).__name__ for layer in layers})) or "none"
        raise TargetError(
            f"soft_prompt prefix: needs keys and values in every layer, and {name} keeps others (its cache: {kept}); "
            "choose soft_prompt prompt"
        )
    kept_tensors = [tensor[0] for layer in layers for tensor in (layer.keys, layer.values)]
    shapes = {tuple(tensor.shape) for tensor in kept_tensors}
    if len(shapes) > 1:
        raise TargetError(
            f"soft_prompt prefix: keys and values of {name} differ in shape between layers or from each other "
            f"({', '.join(map(str, sorted(shapes)))}), for which adapter files have no place; choose soft_prompt prompt"
        )
    if kept_tensors[0].shape[1] != len(ids):
        raise TargetError(
            f"virtual_tokens: a layer of {name} sees only {kept_tensors[0].shape[1] + 1} tokens at once, and a prefix "
            f"of {len(ids)} would be cut; set fewer"
        )
    return kept_tensors


def fresh_prompt(
    model: nn.Module, config: PromptConfig, place: PromptPlace, generator: torch.Generator, tokenizer: Any
) -> SoftPrompt:
    """A soft prompt that was never trained.

    Args:
        model: with no adapter in use.
        config: of the prompt.
        place: in the model.
        generator: of all draws.
        tokenizer: for init text.

    Raises:
        ConfigError: init text, and no tokenizer, or one that makes no tokens of the text.
        TargetError: a layer of the model sees fewer tokens at once than a prefix has.
    """
    count, weight = config.virtual_tokens, place.embedding.get_parameter("weight")
    encoder = _encoder(config, place, generator)
    if weight.is_meta:  # a skeleton has no numbers to begin with
        width = place.width if encoder is None else place.encoder_width
        return SoftPrompt(torch.zeros(count, width), encoder=encoder, key_values=place.key_values)
    if encoder is not None:
        values = torch.randn(count, place.encoder_width, generator=generator)
    elif config.init == "zero":
        values = torch.zeros(count, place.width)
    elif config.init == "random":
        # a prefix as the papers and PEFT have it; embeddings among the others
        deviation = 1.0 if place.key_values is not None else _deviation(place)
        values = torch.randn(count, place.width, generator=generator) * deviation
    else:
        ids = _first_tokens(config, place, generator, tokenizer)
        if place.key_values is None:
            values = place.embedding(ids.to(weight.device)).detach().float().cpu()
        else:
            stacked = torch.stack(_keys_and_values(model, ids))  # (2 layers, heads, p, width)
            values = stacked.float().cpu().permute(2, 0, 1, 3).reshape(count, -1)
    return SoftPrompt(values.clone(), encoder=encoder, key_values=place.key_values)


def _deviation(place: PromptPlace) -> float:
    """Standard deviation of the base's embeddings, from its first rows: quantised ones are not unpacked as a whole."""
    rows = torch.arange(min(place.vocabulary, 4096), device=place.embedding.get_parameter("weight").device)
    return float(place.embedding(rows).detach().float().std())


def _first_tokens(config: PromptConfig, place: PromptPlace, generator: torch.Generator, tokenizer: Any) -> torch.Tensor:
    """(p,) tokens of the vocabulary to begin as."""
    if config.init == "vocabulary":
        return torch.randint(place.vocabulary, (config.virtual_tokens,), generator=generator)
    if tokenizer is None:
        raise ConfigError(
            "prompt_init: text needs a tokenizer: attach(..., tokenizer=tokenizer) in Python; or choose vocabulary"
        )
    ids = list(tokenizer(config.prompt_text)["input_ids"])
    if not ids:
        raise ConfigError(f"prompt_text: the tokenizer makes no tokens of {config.prompt_text!r}")
    times = -(-config.virtual_tokens // len(ids))
    return torch.tensor((ids * times)[: config.virtual_tokens])


def _encoder(config: PromptConfig, place: PromptPlace, generator: torch.Generator) -> nn.Module | None:
    """The network that makes virtual tokens, with torch's own draws from a generator of ours."""
    if config.encoder == "none":
        return None
    hidden = config.encoder_hidden or place.encoder_width
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(generator.initial_seed())
        if config.encoder == "lstm":
            return LSTMEncoder(place.width, hidden, config.encoder_layers)
        if not config.is_prefix:
            return p_tuning_mlp(place.width, hidden)
        encoder = prefix_encoder(place.encoder_width, hidden, place.width)
    if config.init == "zero":
        for parameter in encoder[-1].parameters():
            nn.init.zeros_(parameter)
    return encoder


def loaded_prompt(prompt: Prompt) -> SoftPrompt:
    """A soft prompt from a value that was found to fit; a copy, so that the value stays one."""
    return SoftPrompt(prompt.values.detach().float().clone(), key_values=prompt.key_values)


def misfits(prompt: Prompt, place: PromptPlace) -> list[str]:
    """Why a value's prompt does not fit into a place; empty where it does."""
    expected = (prompt.length, place.width)
    if tuple(prompt.values.shape) != expected or prompt.key_values != place.key_values:
        found = f"{tuple(prompt.values.shape)}, divided as {prompt.key_values}" if place.key_values else ""
        return [
            f"shape: prompt is {found or tuple(prompt.values.shape)} in the adapter, {expected} in the model"
            + (f", {place.key_values}" if place.key_values else "")
        ]
    return []


def saved_prompt(module: SoftPrompt, config: PromptConfig) -> Prompt:
    """A copy as a value, on the CPU: what an encoder makes, not the encoder."""
    with torch.no_grad():
        values = module().detach().to("cpu", copy=True)
    # an encoder's settings say how it was trained, and would mean an encoder to whoever attaches it
    plain = config.replace(prompt_encoder="none", encoder_hidden=None, encoder_layers=2)
    return Prompt(config=plain, values=values, key_values=module.key_values)
