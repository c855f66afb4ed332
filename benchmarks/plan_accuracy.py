"""What `lorakit plan` says against what a run takes, on SmolLM2-135M and this machine: peak memory and time of a step.

Each setting runs in two processes of its own: one plans (with four timed steps), one takes eight steps and an
evaluation as `lorakit train` does and reports the most memory it held. Rows are orders of the demo (real text, 85 to
186 tokens), or of one length. Prints a line a setting and one JSON object.

    python benchmarks/plan_accuracy.py [--only NAME ...]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

# name -> rows ("orders", or tokens of a row), flags of TrainConfig
SETTINGS: dict[str, tuple[str | int, dict[str, object]]] = {
    "16 orders": ("orders", {}),
    "16 orders, bf16": ("orders", {"dtype": "bf16"}),
    "8 orders": ("orders", {"batch_size": 8}),
    "32 orders": ("orders", {"batch_size": 32}),
    "16 orders, rank 64": ("orders", {"lora": {"r": 64}}),
    "16 orders, q and v only": ("orders", {"lora": {"r": 8, "target_modules": ["q_proj", "v_proj"]}}),
    "16 orders, dropout 0.05": ("orders", {"lora": {"r": 8, "dropout": 0.05}}),
    "16 orders, all tokens": ("orders", {"train_on": "all"}),
    "16 orders, checkpointing": ("orders", {"gradient_checkpointing": "on"}),
    "16 orders by 512 tokens": ("orders", {"micro_batch_tokens": 512}),
    "2 rows of 512": (512, {"batch_size": 2}),
    "2 rows of 1,024": (1024, {"batch_size": 2}),
    "1 row of 2,048, checkpointing": (2048, {"batch_size": 1, "gradient_checkpointing": "on"}),
    "1 row of 4,096, checkpointing": (4096, {"batch_size": 1, "gradient_checkpointing": "on"}),
}


def examples_of(kind: str | int, config):
    """Training and validation rows."""
    from lorakit.data.chat import ChatFormat, Example
    from lorakit.data.sources import Origin, Row
    from lorakit.demo.orders import make_orders
    from lorakit.models import load_tokenizer, stop_ids

    if isinstance(kind, int):
        rows = [
            Example([(97 * k + 31 * i) % 40_000 for i in range(kind)], [False] + [True] * (kind - 1), Origin("rows", k))
            for k in range(9 * config.batch_size)
        ]
        return rows, rows[:1]
    tokenizer = load_tokenizer("smollm2")
    chat = ChatFormat(tokenizer, stop_ids(None, tokenizer), config.max_length, "auto", config.train_on)
    orders = make_orders("train", 9 * config.batch_size + 16, 0)
    rows = [e for i, o in enumerate(orders) for e in chat.encode(Row(Origin("orders", i + 1), o.row()))]
    return rows[16:], rows[:16]


def child(name: str, part: str) -> dict[str, float]:
    """Plan one setting, or run it."""
    from lorakit import TrainConfig, machine
    from lorakit.adapter.attach import attach
    from lorakit.models import load_model
    from lorakit.training.loop import Plan, accumulate, ready
    from lorakit.training.objectives import mean_loss
    from lorakit.training.optim import make_optimizer, make_scaler
    from lorakit.training.planning import Planner, checkpoint_activations, timed
    from lorakit.training.run import resolved

    kind, flags = SETTINGS[name]
    values = {"gradient_checkpointing": "off", "learning_rate": 1e-3, "max_length": 4096, "lora": {"r": 8}, **flags}
    config = TrainConfig.from_dict({"model": "smollm2", "data": "-", **values})
    train, valid = examples_of(kind, config)
    device = machine.resolve_device("cpu")
    config = resolved(config, device, Plan.of(config, train), sum(len(example.ids) for example in valid))
    start = time.perf_counter()
    plan = Planner(config, train, valid).plan(None) if part == "plan" else None
    planning = time.perf_counter() - start
    machine.keep_freed_memory()
    model, _ = load_model("smollm2", config.dtype, "cpu")
    checkpoint_activations(model, on=config.gradient_checkpointing == "on")
    handle = attach(model, config.lora)
    if plan is not None:
        rate = timed(plan, config, model, train, valid, steps=4).tokens_per_second
        return {"peak": plan.memory.peak, "tokens_per_second": rate, "planning": planning}
    optimizer = make_optimizer(config, handle.trainable_tensors())
    scaler = make_scaler(model.dtype, device)
    rates = []
    with ready(model, max(len(example.ids) for example in (*train, *valid))) as share:
        mean_loss(model, valid, micro_batch_tokens=config.micro_batch_tokens)
        for number, step in zip(range(9), Plan.of(config, train).steps(0), strict=False):
            start = time.perf_counter()
            accumulate(model, train, step, scaler, 0, number, share=share)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            tokens = sum(len(train[row].ids) for rows in step for row in rows)
            rates.append((tokens, time.perf_counter() - start))
    counted = rates[1:]
    rate = sum(tokens for tokens, _ in counted) / sum(seconds for _, seconds in counted)
    return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "tokens_per_second": rate}


def main() -> None:
    """Every setting in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(SETTINGS))
    parser.add_argument("--child", nargs=2)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(*arguments.child)))
        return
    found = {}
    for name in arguments.only:
        plan, run = (
            json.loads(
                subprocess.run(
                    [sys.executable, __file__, "--child", name, part], check=True, stdout=subprocess.PIPE, text=True
                ).stdout.splitlines()[-1]
            )
            for part in ("plan", "run")
        )
        memory, speed = plan["peak"] / run["peak"], plan["tokens_per_second"] / run["tokens_per_second"]
        found[name] = {"planned": plan, "measured": run, "memory_ratio": memory, "speed_ratio": speed}
        print(
            f"{name:32} memory {plan['peak'] / 1e9:5.2f} / {run['peak'] / 1e9:5.2f} GB = {memory:.2f}   "
            f"speed {plan['tokens_per_second']:5.0f} / {run['tokens_per_second']:5.0f} tokens/s = {speed:.2f}",
            file=sys.stderr,
        )
    print(json.dumps({"settings": found}))


if __name__ == "__main__":
    main()
