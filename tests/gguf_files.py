"""GGUF files as llama.cpp's converter writes them."""

import contextlib

import gguf
import numpy as np
import torch

from tiny_models import CHATML, byte_tokenizer

# where the fp16 scales lie in the blocks of the K formats, which gguf-py cannot make
_SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


@contextlib.contextmanager
def gguf_file(path, architecture="llama", config=None):
    """A writer for the block, closed behind it; with the sizes of a model's config in the header, if there is one."""
    writer = gguf.GGUFWriter(path, architecture)
    if config is not None:
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
        writer.add_rope_freq_base(10000.0)
        writer.add_vocab_size(config.vocab_size)
    yield writer
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def stored(array, kind):
    """A matrix in one of ggml's types: its own numbers, or, of a K format, random ones of much the same size."""
    if kind.name not in _SCALES:
        return gguf.quantize(array, kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    draw = np.random.default_rng(int(abs(array).sum() * 1000))
    blocks = draw.integers(0, 256, (array.size // block, size), dtype=np.uint8)
    for place in _SCALES[kind.name]:
        scales = draw.uniform(1e-4, 4e-4, len(blocks)).astype(np.float16)
        blocks[:, place : place + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(len(array), -1)


def write_gguf(path, model, store=gguf.GGMLQuantizationType.F32):
    """A Llama as llama.cpp's converter writes it; `store` is the type of the matrices."""
    config = model.config
    tokenizer = byte_tokenizer()
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = set(tokenizer.all_special_tokens) | {"<|im_start|>", "<|im_end|>"}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    with gguf_file(path, config=config) as writer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(tokens)
        writer.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens])
        writer.add_token_merges(["h i"])
        writer.add_eos_token_id(tokenizer.convert_tokens_to_ids("<|im_end|>"))
        writer.add_chat_template(CHATML)
        for name, tensor in model.state_dict().items():
            if name == "lm_head.weight":  # tied
                continue
            array = tensor.numpy()
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
                name.split(".")[-2]
            )
            if heads:  # llama.cpp interleaves the halves of each rotary head
                array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
            target = names.get_name(name, try_suffixes=(".weight",))
            kind = store if array.ndim == 2 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(target, stored(np.ascontiguousarray(array), kind), raw_dtype=kind)
    return str(path)


def write_renamed(path, model, architecture, transposed=(), kind=gguf.GGMLQuantizationType.Q8_0, one_more=()):
    """A model whose conversion only renames (and here and there transposes) as a GGUF file without a tokenizer."""
    config = model.config
    names = gguf.get_tensor_name_map(
        next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == architecture), config.num_hidden_layers
    )
    sizes = config if architecture != "gpt2" else None
    with gguf_file(path, architecture, sizes) as writer:
        if sizes is None:
            writer.add_block_count(config.n_layer)
            writer.add_context_length(config.n_positions)
            writer.add_embedding_length(config.n_embd)
            writer.add_head_count(config.n_head)
            writer.add_layer_norm_eps(config.layer_norm_epsilon)
        for name, parameter in model.named_parameters():
            array = parameter.detach().numpy()
            if name.endswith(transposed):
                array = array.T.copy()
            if name.endswith(one_more):
                array = array + 1
            stored = kind if array.ndim == 2 else gguf.GGMLQuantizationType.F32
            target = names.get_name(name, try_suffixes=(".weight", ".bias"))
            writer.add_tensor(target, gguf.quantize(array, stored), raw_dtype=stored)
    return path


def rounded(tensor, store):
    """What a matrix is after a GGUF file has stored it."""
    return (
        torch.from_numpy(gguf.dequantize(gguf.quantize(tensor.numpy(), store), store)) if tensor.ndim == 2 else tensor
    )
