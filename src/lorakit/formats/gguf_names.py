"""Where the layers of a transformers model are in a GGUF file: llama.cpp's names, and the order of rows it gives the
query and key projections of some architectures. Knows no adapters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorakit.errors import AdapterFileError, nearest
from lorakit.formats.codec import BaseFacts

# transformers' model_type -> llama.cpp's architecture: those whose conversion, in llama.cpp, renames linear layers and
# at most permutes the rows of q and k. (What else a conversion changes, such as the shift of Gemma's norms, is no layer
# an adapter has.) Fused projections (Phi-3's qkv and gate_up) stay fused there and are in the map under their own name.
_RENAMED = {
    **{name: name for name in ("qwen2", "qwen3", "gemma", "gemma2", "gemma3", "olmo2", "olmoe", "phi3", "gpt2")},
    **{name: name for name in ("starcoder2", "cohere2", "nemotron", "exaone4", "seed_oss")},
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "gemma3_text": "gemma3",
    "olmo3": "olmo2",
    "phi": "phi2",
    "gpt_bigcode": "starcoder",
    "cohere": "command-r",
}
_PERMUTED = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "olmo": "olmo",
    "granite": "granite",
    "smollm3": "smollm3",
}
TOKEN_EMBEDDING, OUTPUT = "token_embd", "output"


@dataclass(frozen=True, kw_only=True)
class Names:
    """The map of one base.

    Attributes:
        architecture: what llama.cpp calls it.
        of_path: module path -> tensor name without ".weight", e.g. "blk.0.attn_q"; the modules the architecture has.
        heads: tensor name -> number of heads, of projections whose rows are permuted.
        tied: whether one matrix is both embedding and output.
    """

    architecture: str
    of_path: Mapping[str, str]
    heads: Mapping[str, int]
    tied: bool


def names_of(base: BaseFacts | None) -> Names:
    """Build the map for a base.

    Raises:
        AdapterFileError: the base is not given, or of an architecture whose conversion does more than rename.
    """
    if base is None or not base.modules or not base.config:
        raise AdapterFileError("GGUF names layers in its own way: name the base model the adapter belongs to")
    config: Mapping[str, Any] = base.config.get("text_config") or base.config
    model_type = config.get("model_type")
    architecture = _RENAMED.get(str(model_type)) or _PERMUTED.get(str(model_type))
    if architecture is None:
        known = sorted(_RENAMED | _PERMUTED)
        guess = nearest(str(model_type), known, 2)
        raise AdapterFileError(
            f"model type {model_type!r}: llama.cpp's conversion is not known to only rename its layers"
            + (f"; nearest: {', '.join(guess)}" if guess else "")
            + f". Known: {', '.join(known)}. Merge the adapter and convert the merged model instead"
        )
    blocks = config.get("num_hidden_layers", config.get("n_layer"))
    if type(blocks) is not int:
        raise AdapterFileError("the base's config does not say how many layers it has (num_hidden_layers)")
    of_path = _of_path(base.modules, architecture, blocks)
    return Names(
        architecture=architecture,
        of_path=of_path,
        heads=_heads(config, of_path) if model_type in _PERMUTED else {},
        tied=bool(base.config.get("tie_word_embeddings", config.get("tie_word_embeddings", True))),
    )


def _of_path(modules: Mapping[str, Any], architecture: str, blocks: int) -> dict[str, str]:
    """Module path -> tensor name; a name that two modules would share is left out for both."""
    import gguf

    number = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(number, blocks)
    found: dict[str, str] = {}
    for path in modules:
        inner = path.replace("language_model.", "")  # the text model inside a multimodal one
        for spelling in (inner, f"model.{inner}"):  # the latter: a model without its head
            if (name := table.get_name(spelling)) is not None:
                found[path] = name
                break
    given = Counter(found.values())
    return {path: name for path, name in found.items() if given[name] == 1}


def _heads(config: Mapping[str, Any], of_path: Mapping[str, str]) -> dict[str, int]:
    heads = config.get("num_attention_heads")
    if type(heads) is not int:
        raise AdapterFileError("the base's config does not say how many heads it has (num_attention_heads)")
    key_heads = config.get("num_key_value_heads") or heads
    by_kind = {"attn_q": heads, "attn_k": int(key_heads)}
    return {name: by_kind[kind] for name in of_path.values() if (kind := name.rsplit(".", 1)[-1]) in by_kind}
