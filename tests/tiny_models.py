"""Models and tokenizers small enough to build in a test: real transformers classes with random weights."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Settings that make a small model of any Llama-like config class: sizes alone, and with what else most of them take.
DECODER_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
}
SMALL = {**DECODER_SIZES, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def byte_tokenizer(*added, chat_template=CHATML, eos="<|endoftext|>", pad=None):
    """One token a byte, one for "hi", then special: `<|endoftext|>`, `<|im_start|>`, `<|im_end|>`, `added`."""
    vocabulary = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "hi"]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[("h", "i")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *added])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos,
        pad_token=pad,
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def tiny_llama(vocabulary=272, seed=0, context=512, **changes):
    """A Llama of 2 layers and 32 dimensions, fp32: grouped keys, tied embeddings, large weights."""
    torch.manual_seed(seed)
    settings = {"vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": context}
    settings |= {"tie_word_embeddings": True, "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()


def tiny_gpt2(vocabulary=272, seed=0, context=512, **changes):
    """A GPT-2 of 2 layers and 32 dimensions, fp32: learned positions, Conv1D layers, no pad token."""
    torch.manual_seed(seed)
    settings = {"vocab_size": vocabulary, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": context}
    settings |= {"initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None}
    return GPT2LMHeadModel(GPT2Config(**settings | changes)).eval()
