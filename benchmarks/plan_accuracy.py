"""What `lorakit plan` says against what a run takes, on this machine: peak memory and time of a step.

Each setting runs in two processes of its own: one plans (with four timed steps), one trains nine steps by the loop of
`lorakit train` and reports the most memory it held and the speed of the last eight. Rows are orders of the demo (real
text, 85 to 186 tokens), or random tokens of one length. Models are SmolLM2-135M and, from their configs alone with
random weights, a GPT-2 of 124M (learned positions, dropout, Conv1D) and a BLOOM of 50M whose rows cannot be packed.

Prints a line a setting, the table for docs/log.md with what misses 10% in memory or 15% in time, and one JSON object.

    python benchmarks/plan_accuracy.py [--only NAME ...] [--list]

All settings take about 20 minutes on two quiet cores. Memory may be measured beside other work, time may not.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS = 9  # the first one, which touches the memory, is not timed
MEMORY_MISS, TIME_MISS = 0.10, 0.15

# name -> model, rows ("orders", or tokens of a row), flags of TrainConfig
SETTINGS: dict[str, tuple[str, str | int, dict[str, object]]] = {
    "16 orders": ("smollm2", "orders", {}),
    "16 orders, bf16": ("smollm2", "orders", {"dtype": "bf16"}),
    "8 orders": ("smollm2", "orders", {"batch_size": 8}),
    "32 orders": ("smollm2", "orders", {"batch_size": 32}),
    "16 orders, rank 64": ("smollm2", "orders", {"lora": {"r": 64}}),
    "16 orders, q and v only": ("smollm2", "orders", {"lora": {"r": 8, "target_modules": ["q_proj", "v_proj"]}}),
    "8 orders, dropout 0.05": ("smollm2", "orders", {"batch_size": 8, "lora": {"r": 8, "dropout": 0.05}}),
    "16 orders, all tokens": ("smollm2", "orders", {"train_on": "all"}),
    "16 orders, checkpointing": ("smollm2", "orders", {"gradient_checkpointing": "on"}),
    "16 orders, checkpointing, bf16": ("smollm2", "orders", {"gradient_checkpointing": "on", "dtype": "bf16"}),
    "16 orders by 512 tokens": ("smollm2", "orders", {"micro_batch_tokens": 512}),
    "2 rows of 512": ("smollm2", 512, {"batch_size": 2}),
    "2 rows of 1,024": ("smollm2", 1024, {"batch_size": 2}),
    "1 row of 2,048, checkpointing": ("smollm2", 2048, {"batch_size": 1, "gradient_checkpointing": "on"}),
    "1 row of 4,096, checkpointing, bf16": (
        "smollm2",
        4096,
        {"batch_size": 1, "gradient_checkpointing": "on", "dtype": "bf16"},
    ),
    "GPT-2, 4 rows of 256": ("gpt2", 256, {"batch_size": 4}),
    "BLOOM, not packed, 4 rows of 128": ("bloom", 128, {"batch_size": 4}),
}


def model_of(name: str, folder: Path) -> str:
    """What `load_weights` takes: the alias, or a folder with random weights."""
    if name == "smollm2":
        return name
    import torch
    from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = {
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config()),
        "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=32_000, hidden_size=512, n_layer=8, n_head=8)),
    }[name]()
    model.save_pretrained(folder / name)
    return str(folder / name)


def examples_of(kind: str | int, config):
    """Training and validation rows: enough for one epoch of all steps."""
    from lorakit.data.chat import ChatFormat, Example
    from lorakit.data.sources import Origin, Row
    from lorakit.demo.orders import make_orders
    from lorakit.models import load_tokenizer, stop_ids

    if isinstance(kind, int):
        rows = [
            Example([(97 * k + 31 * i) % 30_000 for i in range(kind)], [False] + [True] * (kind - 1), Origin("rows", k))
            for k in range(STEPS * config.batch_size)
        ]
        return rows, rows[:1]
    tokenizer = load_tokenizer("smollm2")
    chat = ChatFormat(tokenizer, stop_ids(None, tokenizer), config.max_length, "auto", config.train_on)
    orders = make_orders("train", STEPS * config.batch_size + 16, 0)
    rows = [e for i, o in enumerate(orders) for e in chat.encode(Row(Origin("orders", i + 1), o.row()))]
    return rows[16:], rows[:16]


def child(name: str, part: str, model_name: str, folder: Path) -> dict[str, object]:
    """Plan one setting, or run it."""
    from lorakit import TrainConfig, machine
    from lorakit.adapter.attach import attach
    from lorakit.files import JsonLines
    from lorakit.models import load_weights
    from lorakit.training.loop import Plan, fit
    from lorakit.training.planning import Planner, checkpoint_activations, timed
    from lorakit.training.run import resolved

    _, kind, flags = SETTINGS[name]
    values = {"gradient_checkpointing": "off", "learning_rate": 1e-3, "max_length": 4096, "lora": {"r": 8}, **flags}
    config = TrainConfig.from_dict({"model": model_name, "data": "-", "dtype": "fp32", **values})
    train, valid = examples_of(kind, config)
    device = machine.resolve_device("cpu")
    machine.keep_few_kernels()
    config = config.replace(max_steps=STEPS, eval_steps=STEPS, save_steps=STEPS)
    config = resolved(config, device, Plan.of(config, train), sum(len(example.ids) for example in valid))
    start = time.perf_counter()
    plan = Planner(config, train, valid).plan(None)  # in the run too, as `lorakit train` does
    planning = time.perf_counter() - start
    machine.keep_freed_memory()
    model = load_weights(model_name, config.dtype, "cpu")
    checkpoint_activations(model, on=config.gradient_checkpointing == "on")
    handle = attach(model, config.lora)
    if part == "plan":
        rate = timed(plan, config, model, train, valid, steps=4).tokens_per_second
        told = {"tokens_per_second": rate, "planning": planning}
        return {"peak": plan.memory.peak, "memory": plan.to_dict()["memory"], **told}
    fit(model, handle.trainable_tensors(), train, valid, config, folder=folder, identity={}, checkpoint=None)
    steps = [row for row in JsonLines(folder / "metrics.jsonl").rows() if "seconds" in row][1:]
    rate = sum(row["tokens"] for row in steps) / sum(row["seconds"] for row in steps)
    return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "tokens_per_second": rate}


def in_its_own_process(name: str, part: str, folder: Path) -> dict[str, float]:
    """The model is made in yet another one: what that takes is no part of a run."""
    run = folder / part
    run.mkdir()
    command = [sys.executable, __file__, "--child", name, part, "--folder", str(run)]
    made = subprocess.run([*command, "--make"], check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
    told = subprocess.run([*command, "--model", made], check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(told.splitlines()[-1])


def main() -> None:
    """Every setting in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(SETTINGS), help="settings by name")
    parser.add_argument("--list", action="store_true", help="names of the settings")
    for internal in ("--child", "--folder", "--model", "--make"):
        options = {"--child": {"nargs": 2}, "--make": {"action": "store_true"}}.get(internal, {})
        parser.add_argument(internal, help=argparse.SUPPRESS, **options)
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(SETTINGS))
        return
    if arguments.child:
        name, part = arguments.child
        folder = Path(arguments.folder)
        if arguments.make:
            print(model_of(SETTINGS[name][0], folder))
        else:
            print(json.dumps(child(name, part, arguments.model, folder)))
        return
    found, table = {}, ["| setting | memory, GB, planned / measured | tokens/s, planned / measured | misses |"]
    table.append("|---|---|---|---|")
    for name in arguments.only:
        with tempfile.TemporaryDirectory() as folder:
            plan, run = (in_its_own_process(name, part, Path(folder)) for part in ("plan", "run"))
        memory, speed = plan["peak"] / run["peak"], plan["tokens_per_second"] / run["tokens_per_second"]
        found[name] = {"planned": plan, "measured": run, "memory_ratio": memory, "speed_ratio": speed}
        misses = [
            what
            for what, ratio, most in (("memory", memory, MEMORY_MISS), ("time", 1 / speed, TIME_MISS))
            if abs(ratio - 1) > most
        ]
        table.append(
            f"| {name} | {plan['peak'] / 1e9:.2f} / {run['peak'] / 1e9:.2f} = {memory:.2f} "
            f"| {plan['tokens_per_second']:,.0f} / {run['tokens_per_second']:,.0f} = {speed:.2f} "
            f"| {', '.join(misses)} |"
        )
        print(table[-1], f"planned in {plan['planning']:.1f} s", file=sys.stderr, flush=True)
    print("\n".join(table))
    print(json.dumps({"settings": found}))


if __name__ == "__main__":
    main()
