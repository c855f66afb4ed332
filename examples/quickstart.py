"""The Python interface in one page: an adapter on any torch model, then one trained on rows for a language model.

Run: python examples/quickstart.py            (the first part: seconds, needs no model)
     python examples/quickstart.py smollm2    (both; a minute or two on a laptop)
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import lorakit
from lorakit import Adapter, LoRAConfig, TrainConfig


def adapt_any_module() -> None:
    """Adapt a plain torch model: train the adapter, switch it off and on, keep it as a value, give the base back."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 1))
    x = torch.randn(256, 8)
    y = x[:, :1] * x[:, 1:2]  # what the base has never seen
    before = model(x).detach()

    adapters = lorakit.attach(model, LoRAConfig(r=4, alpha=8, target_modules=("0", "2")))
    optimizer = torch.optim.AdamW(adapters.trainable_parameters(), lr=1e-2)  # the base is frozen
    for _ in range(300):
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = model(x).detach()
    print(f"error {nn.functional.mse_loss(before, y):.3f} -> {nn.functional.mse_loss(after, y):.3f}")

    with adapters.disabled():
        assert torch.equal(model(x), before)  # the base, bit for bit
    adapter = adapters.extract()  # a value: no model needed to save, scale or inspect it
    print(f"adapter: {adapter.nbytes:,} bytes, update of layer 0 {tuple(adapter.delta('0').shape)}")

    adapters.detach()
    assert torch.equal(model(x), before)
    with tempfile.TemporaryDirectory() as folder:
        adapter.save(folder)  # PEFT's format
        lorakit.attach(model, Adapter.load(folder))
    torch.testing.assert_close(model(x), after)


def train_and_ask(model_name: str, folder: Path) -> None:
    """Train on rows, then ask the same question with and without the adapter."""
    colours = ["red", "green", "blue", "black", "white", "pink", "grey", "brown"]
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"My {thing} is {colour}."},
                {"role": "assistant", "content": f"[{colour}]"},
            ]
        }
        for colour in colours
        for thing in ("car", "hat", "cup", "bag")
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = lorakit.train(
        TrainConfig(
            model=model_name, data=str(data), output=str(folder / "run"), lora=LoRAConfig(r=8), batch_size=8, samples=0
        )
    )
    print(f"validation loss {run.initial_loss:.3f} -> {run.best_loss:.3f}; adapter in {run.adapter}")

    model, tokenizer = lorakit.load_model(model_name)
    adapters = lorakit.attach(model, run.adapter)
    question = [{"role": "user", "content": "My coat is yellow."}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    (answer,) = lorakit.generate(model, tokenizer, [ids], max_new_tokens=24)
    with adapters.disabled():
        (base_answer,) = lorakit.generate(model, tokenizer, [ids], max_new_tokens=24)
    print(f"base:    {base_answer.text}\nadapter: {answer.text}")


if __name__ == "__main__":
    adapt_any_module()
    if len(sys.argv) > 1:
        with tempfile.TemporaryDirectory() as scratch:
            train_and_ask(sys.argv[1], Path(scratch))
