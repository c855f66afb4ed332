"""A tiny model on disk, adapters for it with an update that shows, and questions about colours."""

import json

import torch

import lorakit
from tiny_models import byte_tokenizer, tiny_llama

COLOURS = ("red", "green", "blue", "amber", "teal", "pink")


def save_model(folder, **changes):
    tokenizer = byte_tokenizer()
    tiny_llama(vocabulary=len(tokenizer), **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_adapter(folder, model_folder, seed=0, tokenizer=None):
    """An adapter as if trained: B is not zero. With a tokenizer, as `lorakit train` saves it."""
    model, _ = lorakit.load_model(model_folder, dtype="fp32", device="cpu")
    handle = lorakit.attach(model, lorakit.LoRAConfig(r=4))
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in handle.trainable_tensors().items():
        if name.endswith(".B"):
            tensor.data = torch.randn(tensor.shape, generator=generator) * 0.3
    handle.save("default", folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)


def conversation(number, answer="blue", **more):
    question = f"{number}: {COLOURS[number % 6]} and {COLOURS[number * 5 % 6]}?"
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        **more,
    }


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
