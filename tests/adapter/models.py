"""Small models with every kind of site, and a random adapter for each; shared by the tests of core, adapter and
formats.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import lorakit
from lorakit import Adapter, LoRAConfig
from lorakit.adapter.attach import AttachedAdapters
from tiny_models import DECODER_SIZES


@dataclass
class Case:
    """A model, an input for it, what to adapt, and where its output is."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, torch.Tensor]]
    targets: str | tuple[str, ...]
    some_layer: str
    parameters: tuple[str, ...] = ()

    @property
    def some_path(self) -> str:
        """A path of an adapter: that of `some_layer`, or of a stack in it."""
        return f"{self.some_layer}.down_proj" if self.some_layer.endswith("experts") else self.some_layer

    @property
    def what(self) -> dict[str, object]:
        """Settings of a LoRAConfig."""
        return {"target_modules": self.targets, "target_parameters": self.parameters}

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(0)
        model = self.make().to(dtype).eval()
        if dtype == torch.bfloat16:  # rounding decides which expert is a token's last: here all are chosen
            for router in [
                module for module in model.modules() if hasattr(module, "top_k") and hasattr(module, "num_experts")
            ]:
                router.top_k = router.num_experts
        return model

    def run(self, model: nn.Module) -> torch.Tensor:
        torch.manual_seed(1)
        dtype = next(model.parameters()).dtype
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.inputs().items()}
        output = model(**inputs)
        if isinstance(output, torch.Tensor):
            return output
        return output.logits if "logits" in output else output.last_hidden_state


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 20)
        self.norm = nn.LayerNorm(20)
        self.second = nn.Linear(20, 7, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.norm(self.first(x))))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 8, 3, padding=1)
        self.two = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2)
        self.circular = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
        self.same = nn.Conv2d(8, 6, 3, padding="same", dilation=2)
        self.three = nn.Conv3d(6, 5, (1, 3, 3), bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (N, 4, 16)
        h = self.one(x).unflatten(2, (4, 4)).repeat(1, 1, 3, 3)
        return self.three(self.same(self.circular(self.two(h)))[:, :, None])


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 10, padding_idx=0)
        self.out = nn.Linear(10, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.table(ids))


class Encoder(nn.Module):
    """torch's own encoder, which in eval mode may read its layers' weights past their forward()."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        return self.encoder(x, src_key_padding_mask=padding.bool())[:, :4]  # what is padding in every row may be cut


class Attention(nn.Module):
    """torch's MultiheadAttention: self-attention, then attention over something else, with masks."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(12, 3, batch_first=batch_first)
        self.cross = nn.MultiheadAttention(12, 2, batch_first=batch_first, add_bias_kv=True, add_zero_attn=True)
        self.out = nn.Linear(12, 5)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, 0.2)

    def forward(self, x: torch.Tensor, other: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        turn = (lambda t: t) if self.first.batch_first else (lambda t: t.transpose(0, 1))
        x, other = turn(x), turn(other)
        causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
        x = x + self.first(x, x, x, attn_mask=causal, is_causal=True, need_weights=False)[0]
        attended, weights = self.cross(x, other, other, key_padding_mask=padding.bool())
        return self.out(turn(x + attended)) + weights.sum(-1, keepdim=True)


def _attention_inputs() -> dict[str, torch.Tensor]:
    padding = torch.tensor([[0] * 7, [0] * 4 + [1] * 3, [0] * 6 + [1]])
    return {"x": torch.randn(3, 5, 12), "other": torch.randn(3, 7, 12), "padding": padding}


def _ids() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(0, 96, (2, 9))}


LLAMA = {**DECODER_SIZES, "max_position_embeddings": 64, "tie_word_embeddings": True}


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**LLAMA))


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=97, n_positions=64, bos_token_id=0, eos_token_id=0)
    )


def bert() -> BertModel:
    return BertModel(
        BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=97)
    )


def vit() -> ViTForImageClassification:
    config = ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16)
    config.patch_size, config.num_labels = 8, 3
    return ViTForImageClassification(config)


EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


def mixtral(**changes: object) -> MixtralForCausalLM:
    settings = {
        **DECODER_SIZES,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "initializer_range": 0.05,
        "experts_implementation": "eager",
    }
    return MixtralForCausalLM(MixtralConfig(**settings | changes))


def qwen3_moe(**changes: object) -> Qwen3MoeForCausalLM:
    settings = {**DECODER_SIZES, "head_dim": 8, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**settings | {"initializer_range": 0.05, "experts_implementation": "eager"} | changes)
    )


CASES = {
    "mlp": Case(MLP, lambda: {"x": torch.randn(3, 5, 12)}, "all-linear", "first"),
    "convolutions": Case(
        Convolutions, lambda: {"x": torch.randn(2, 4, 16)}, ("one", "two", "circular", "same", "three"), "two"
    ),
    "embedding": Case(Lookup, lambda: {"ids": torch.randint(0, 30, (2, 6))}, ("table", "out"), "table"),
    "torch encoder": Case(
        Encoder,
        lambda: {"x": torch.randn(3, 5, 8), "padding": torch.tensor([[0, 0, 0, 0, i] for i in (0, 1, 1)])},
        "all-linear",
        "encoder.layers.1.linear2",
    ),
    "attention": Case(lambda: Attention(True), _attention_inputs, "all-linear", "first"),
    "attention, sequence first": Case(
        lambda: Attention(False), _attention_inputs, ("first", "cross"), "cross.out_proj"
    ),
    "mixtral": Case(mixtral, _ids, "all-linear", "model.layers.1.self_attn.q_proj", EXPERTS),
    "qwen3 moe": Case(qwen3_moe, _ids, (), "model.layers.1.mlp.experts", ("gate_up_proj", "down_proj")),
    "llama": Case(llama, _ids, "all-linear", "model.layers.1.mlp.up_proj"),
    "llama embedding": Case(llama, _ids, ("embed_tokens", "q_proj"), "model.embed_tokens"),
    "gpt2": Case(gpt2, _ids, "all-linear", "transformer.h.0.attn.c_attn"),
    "bert": Case(bert, _ids, r".*\.(query|value)", "encoder.layer.0.attention.self.query"),
    "vit": Case(
        vit,
        lambda: {"pixel_values": torch.randn(2, 3, 16, 16)},
        ("q_proj", "v_proj", "projection"),
        "vit.embeddings.patch_embeddings.projection",
    ),
}


# what can have biases of B (`lora_bias`): no embedding, attention or experts
WITH_LORA_BIAS = {
    **{name: CASES[name] for name in ("mlp", "convolutions", "llama", "gpt2", "bert", "vit")},
    "embedding": replace(CASES["embedding"], targets=("out",)),
    "torch encoder": replace(CASES["torch encoder"], targets=("linear1", "linear2")),
    "mixtral": replace(CASES["mixtral"], parameters=()),
}


def weight_at(model: nn.Module, path: str) -> tuple[nn.Parameter, bool]:
    """The weight that a path of an adapter names, and whether it lies (in, out)."""
    parent, _, name = path.rpartition(".")
    if isinstance(getattr(model.get_submodule(parent), name), nn.Parameter):
        experts = model.get_submodule(parent)
        return experts.get_parameter(name), experts.is_transposed
    layer = model.get_submodule(path)
    if isinstance(layer, nn.MultiheadAttention):
        return layer.in_proj_weight, False
    return layer.get_parameter("weight"), type(layer).__name__.endswith("Conv1D")


def randomise(handle: AttachedAdapters, name: str = "default", size: float = 0.2) -> None:
    """Give an adapter's tensors random values, so that its update is not zero."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    with torch.no_grad():
        for parameter in handle.trainable_tensors(name).values():
            parameter.add_(torch.empty(parameter.shape).normal_(0, size, generator=generator).to(parameter))


def trained(model: nn.Module, config: LoRAConfig) -> Adapter:
    """A random adapter of the model, as a value; the model is as it was."""
    handle = lorakit.attach(model, config)
    randomise(handle)
    value = handle.extract()
    handle.detach()
    return value
