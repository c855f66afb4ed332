"""A training step of lorakit against the same rows through transformers + PEFT with padding, in turn, on this machine.

Both sides: SmolLM2-135M, the same rows, labels and batches, rank 8 on all linear layers, AdamW, the dtype lorakit
chooses here. Each
side runs in a process of its own, so that peak memory is its own; the losses are printed, so that nobody is faster by
doing less.
Prints one JSON object: tokens per second, their ratio, peak memory in GB and its ratio.

    python benchmarks/train_step.py [--steps 6] [--rows 16]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

SIDES = ("lorakit", "peft")


def batches(tokenizer, stop_ids, steps: int, rows: int):
    """Examples of the demo's task and the steps made of them: real text that every clone has."""
    from lorakit.data.batches import plan_steps
    from lorakit.data.chat import ChatFormat
    from lorakit.data.sources import Origin, Row
    from lorakit.demo.orders import make_orders

    chat = ChatFormat(tokenizer, stop_ids, 1024)
    orders = make_orders("train", steps * rows, 0)
    examples = [e for i, o in enumerate(orders) for e in chat.encode(Row(Origin("orders", i + 1), o.row()))]
    lengths = [len(e.ids) for e in examples]
    return examples, plan_steps(lengths, seed=0, epoch=0, batch_size=rows, micro_batch_tokens=1 << 20)


def padded_loss(model, examples, indices):
    """Mean loss of a padded batch, as everybody does it: full logits, labels -100 where nothing is trained."""
    import torch

    longest = max(len(examples[i].ids) for i in indices)
    ids, labels, mask = (torch.full((len(indices), longest), fill) for fill in (0, -100, 0))
    for row, i in enumerate(indices):
        n = len(examples[i].ids)
        ids[row, :n], mask[row, :n] = torch.tensor(examples[i].ids), 1
        labels[row, :n] = torch.where(torch.tensor(examples[i].trained), ids[row, :n], -100)
    return model(input_ids=ids, attention_mask=mask, labels=labels).loss


def run(side: str, steps: int, rows: int) -> dict[str, object]:
    """One side: one step to warm up, then `steps` timed ones."""
    import contextlib

    import torch

    import lorakit
    from lorakit import LoRAConfig, TrainConfig, machine
    from lorakit.models import load_model, stop_ids
    from lorakit.training.loop import accumulate, ready
    from lorakit.training.optim import make_optimizer, make_scaler

    model, tokenizer = load_model("smollm2")
    examples, plan = batches(tokenizer, stop_ids(model, tokenizer), steps + 1, rows)
    config = TrainConfig(model="smollm2", data="-", output="-", learning_rate=1e-3)
    if side == "lorakit":
        machine.keep_freed_memory()  # as `train` does
        handle = lorakit.attach(model, LoRAConfig(r=8))
        tensors = handle.trainable_tensors()
    else:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=32, target_modules="all-linear"))
        tensors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(config, tensors)
    scaler = make_scaler(model.dtype, torch.device("cpu"))
    losses, tokens, seconds = [], 0, 0.0
    with ready(model, max(len(e.ids) for e in examples)) if side == "lorakit" else contextlib.nullcontext() as share:
        for number, micro_batches in enumerate(plan):
            start = time.perf_counter()
            if side == "lorakit":
                losses.append(accumulate(model, examples, micro_batches, scaler, 0, number, share=share))
            else:
                model.train()
                (indices,) = micro_batches
                loss = padded_loss(model, examples, indices)
                loss.backward()
                losses.append(float(loss.detach()))
            torch.nn.utils.clip_grad_norm_(tensors.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if number > 0:
                seconds += time.perf_counter() - start
                tokens += sum(len(examples[i].ids) for indices in micro_batches for i in indices)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"tokens_per_second": round(tokens / seconds, 1), "peak_gb": round(peak, 2), "losses": losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--side", choices=SIDES)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(run(arguments.side, arguments.steps, arguments.rows)))
        return
    results = {}
    for side in SIDES:
        command = [sys.executable, "-W", "ignore", __file__, "--side", side]
        command += ["--steps", str(arguments.steps), "--rows", str(arguments.rows)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results[side] = json.loads(output.splitlines()[-1])
    ours, theirs = results["lorakit"], results["peft"]
    ratio = ours["tokens_per_second"] / theirs["tokens_per_second"]
    memory = ours["peak_gb"] / theirs["peak_gb"]
    print(json.dumps({**results, "speed_ratio": round(ratio, 2), "memory_ratio": round(memory, 2)}))


if __name__ == "__main__":
    main()
