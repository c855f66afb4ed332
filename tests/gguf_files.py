"""GGUF files as llama.cpp's converter writes them."""

import contextlib

import gguf


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
