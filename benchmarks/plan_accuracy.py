"""What `lorakit plan` says against what a run takes, on this machine: peak memory and time of a step.

Each setting runs in processes of its own: one plans, one times four steps as a plan does, one trains nine steps (four
of long rows) by the loop of `lorakit train`, evaluations and a checkpoint included, and reports the most memory it held
and the speed of all but the first. Rows are orders of the demo (real text, 85 to 186 tokens), or random tokens of one
length. Models are SmolLM2-135M and, from their configs alone with random weights, a GPT-2 of 124M (learned positions,
dropout, Conv1D), a BLOOM of 50M whose rows cannot be packed, and one of Qwen2.5-0.5B's shape.

Prints a line a setting, the table for docs/log.md with what misses 10% in memory or 15% in time, and one JSON object.

    python benchmarks/plan_accuracy.py [--only NAME ...] [--memory] [--list]

Memory may be measured beside other work (`--memory`), time may not.
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
from typing import Any

STEPS, OF_LONG_ROWS = 9, 4  # the first one, which touches the memory, is not timed
LONG = 2048
MEMORY_MISS, TIME_MISS = 0.10, 0.15

# name -> model, rows ("orders", or tokens of a row), flags of TrainConfig
SETTINGS: dict[str, tuple[str, str | int, dict[str, object]]] = {
    "16 orders": ("smollm2", "orders", {}),
    "16 orders, bf16": ("smollm2", "orders", {"dtype": "bf16"}),
    "8 orders": ("smollm2", "orders", {"batch_size": 8}),
    "32 orders": ("smollm2", "orders", {"batch_size": 32}),
    "16 orders, rank 64": ("smollm2", "orders", {"lora": {"r": 64}}),
    "16 orders, q and v only": ("smollm2", "orders", {"lora": {"r": 8, "target_modules": ["q_proj", "v_proj"]}}),
    "16 orders, DoRA": ("smollm2", "orders", {"lora": {"r": 8, "delta": "dora"}}),
    "8 orders, dropout 0.05": ("smollm2", "orders", {"batch_size": 8, "lora": {"r": 8, "dropout": 0.05}}),
    "16 orders, all tokens": ("smollm2", "orders", {"train_on": "all"}),
    "16 orders, int8 products": ("smollm2", "orders", {"frozen_products": "int8"}),
    "16 orders, nf4": ("smollm2", "orders", {"quantize": "nf4"}),
    "16 orders, int8 base": ("smollm2", "orders", {"quantize": "int8"}),
    "16 orders, blocks": ("smollm2", "orders", {"quantize": "blocks"}),
    "16 orders, blocks, checkpointing": ("smollm2", "orders", {"quantize": "blocks", "gradient_checkpointing": "on"}),
    "16 orders, checkpointing": ("smollm2", "orders", {"gradient_checkpointing": "on"}),
    "16 orders, checkpointing, bf16": ("smollm2", "orders", {"gradient_checkpointing": "on", "dtype": "bf16"}),
    "16 orders by 512 tokens": ("smollm2", "orders", {"micro_batch_tokens": 512}),
    "16 orders, full": ("smollm2", "orders", {"method": "full"}),
    "16 orders, full, checkpointing": ("smollm2", "orders", {"method": "full", "gradient_checkpointing": "on"}),
    "16 orders, upper 10 layers, trunk kept": (
        "smollm2",
        "orders",
        {"lora": {"r": 8, "layers": list(range(20, 30))}, "cache_trunk": "memory"},
    ),
    "2 rows of 512": ("smollm2", 512, {"batch_size": 2}),
    "2 rows of 1,024": ("smollm2", 1024, {"batch_size": 2}),
    "1 row of 2,048, checkpointing": ("smollm2", 2048, {"batch_size": 1, "gradient_checkpointing": "on"}),
    "1 row of 4,096, checkpointing": ("smollm2", 4096, {"batch_size": 1, "gradient_checkpointing": "on"}),
    "1 row of 4,096, checkpointing, bf16": (
        "smollm2",
        4096,
        {"batch_size": 1, "gradient_checkpointing": "on", "dtype": "bf16"},
    ),
    "GPT-2, 4 rows of 256": ("gpt2", 256, {"batch_size": 4}),
    "BLOOM, not packed, 4 rows of 128": ("bloom", 128, {"batch_size": 4}),
    "0.5B, 4 rows of 128": ("qwen2", 128, {"batch_size": 4}),
    "0.5B, 2 rows of 512, nf4, checkpointing": (
        "qwen2",
        512,
        {"batch_size": 2, "quantize": "nf4", "gradient_checkpointing": "on"},
    ),
}


def model_of(name: str, folder: Path) -> str:
    """What `load_weights` takes: the alias, or a folder with random weights."""
    if name == "smollm2":
        return name
    import torch
    from transformers import (
        BloomConfig,
        BloomForCausalLM,
        GPT2Config,
        GPT2LMHeadModel,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    torch.manual_seed(0)
    half_a_billion = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "vocab_size": 151_936}
    half_a_billion |= {"num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True}
    model = {
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config()),
        "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=32_000, hidden_size=512, n_layer=8, n_head=8)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**half_a_billion)),
    }[name]()
    model.save_pretrained(folder / name)
    return str(folder / name)


def steps_of(kind: str | int) -> int:
    """How many are run; long rows take their time."""
    return OF_LONG_ROWS if isinstance(kind, int) and kind >= LONG else STEPS


def examples_of(kind: str | int, config):
    """Training and validation rows: enough for one epoch of all steps."""
    from lorakit.data.chat import ChatFormat, Example
    from lorakit.data.sources import Origin, Row
    from lorakit.demo.orders import make_orders
    from lorakit.models import load_tokenizer, stop_ids

    if isinstance(kind, int):
        rows = [
            Example([(97 * k + 31 * i) % 30_000 for i in range(kind)], [False] + [True] * (kind - 1), Origin("rows", k))
            for k in range(steps_of(kind) * config.batch_size)
        ]
        return rows, rows[:1]
    tokenizer = load_tokenizer("smollm2")
    chat = ChatFormat(tokenizer, stop_ids(None, tokenizer), config.max_length, "auto", config.train_on)
    orders = make_orders("train", steps_of(kind) * config.batch_size + 16, 0)
    rows = [e for i, o in enumerate(orders) for e in chat.encode(Row(Origin("orders", i + 1), o.row()))]
    return rows[16:], rows[:16]


def child(name: str, part: str, model_name: str, folder: Path) -> dict[str, object]:
    """Plan one setting, time its steps as a plan does, or run it."""
    from lorakit import TrainConfig, machine
    from lorakit.files import JsonLines
    from lorakit.models import load_weights
    from lorakit.training.loop import Plan, fit
    from lorakit.training.planning import Planner
    from lorakit.training.recomputing import checkpoint_activations
    from lorakit.training.run import resolved
    from lorakit.training.subject import subject_of
    from lorakit.training.timing import timed

    _, kind, flags = SETTINGS[name]
    lora = {} if flags.get("method") == "full" else {"lora": {"r": 8}}
    steps = steps_of(kind)
    values = {"gradient_checkpointing": "off", "learning_rate": 1e-3, "max_length": 4096, "quantize": "none"}
    config = TrainConfig.from_dict({"model": model_name, "data": "-", "dtype": "fp32", **values, **lora, **flags})
    train, valid = examples_of(kind, config)
    device = machine.resolve_device("cpu")
    machine.keep_few_kernels()
    config = config.replace(max_steps=steps, eval_steps=-(-steps // 2), save_steps=steps)  # steps hold the best so far
    config = resolved(config, device, Plan.of(config, train), sum(len(example.ids) for example in valid))
    start = time.perf_counter()
    plan = Planner(config, train, valid).plan(None)  # in the run too, as `lorakit train` does
    planning = time.perf_counter() - start
    if part == "plan":
        return {"peak": plan.memory.peak, "memory": plan.to_dict()["memory"], "planning": planning}
    config = plan.chosen.applied(config)
    machine.keep_freed_memory()
    model = load_weights(model_name, config.dtype, "cpu", config.quantize)
    checkpoint_activations(model, on=config.gradient_checkpointing == "on")
    subject = subject_of(model, config, config.lora)
    if part == "time":
        return {"tokens_per_second": timed(plan, config, model, train, valid, steps=4).tokens_per_second}
    fit(model, subject.tensors, train, valid, config, folder=folder, identity={}, checkpoint=None)
    timed_steps = [row for row in JsonLines(folder / "metrics.jsonl").rows() if "seconds" in row][1:]
    rate = sum(row["tokens"] for row in timed_steps) / sum(row["seconds"] for row in timed_steps)
    return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "tokens_per_second": rate}


def in_its_own_process(name: str, part: str, folder: Path, model: str) -> dict[str, Any]:
    """What `child` gives."""
    run = folder / part
    run.mkdir()
    command = [sys.executable, __file__, "--child", name, part, "--folder", str(run), "--model", model]
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return dict(json.loads(told.splitlines()[-1]))


def compared(name: str, *, speed: bool) -> dict[str, Any]:
    """A setting planned and run: both sides, and planned / measured."""
    with tempfile.TemporaryDirectory() as folder:
        make = [sys.executable, __file__, "--make", SETTINGS[name][0], "--folder", folder]
        # in another process: what making it takes is no part of a run
        model = subprocess.run(make, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        parts = ("plan", "time", "run") if speed else ("plan", "run")
        told = {part: in_its_own_process(name, part, Path(folder), model) for part in parts}
    found = {"planned": {**told.get("time", {}), **told["plan"]}, "measured": told["run"]}
    ratios = {"memory_ratio": told["plan"]["peak"] / told["run"]["peak"]}
    if speed:
        ratios["speed_ratio"] = told["time"]["tokens_per_second"] / told["run"]["tokens_per_second"]
    return {**found, **ratios}


def line(name: str, found: dict[str, Any]) -> str:
    """A row of the table."""
    planned, measured = found["planned"], found["measured"]
    memory = f"{planned['peak'] / 1e9:.2f} / {measured['peak'] / 1e9:.2f} = {found['memory_ratio']:.2f}"
    misses = ["memory"] * (abs(found["memory_ratio"] - 1) > MEMORY_MISS)
    if "speed_ratio" not in found:
        return f"| {name} | {memory} | {', '.join(misses)} |"
    misses += ["time"] * (abs(1 / found["speed_ratio"] - 1) > TIME_MISS)
    rates = f"{planned['tokens_per_second']:,.0f} / {measured['tokens_per_second']:,.0f} = {found['speed_ratio']:.2f}"
    return f"| {name} | {memory} | {rates} | {', '.join(misses)} |"


def main() -> None:
    """Every setting in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(SETTINGS), metavar="NAME", help="settings by name")
    parser.add_argument("--memory", action="store_true", help="memory alone, for which the machine may be busy")
    parser.add_argument("--list", action="store_true", help="names of the settings")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    for internal in ("--make", "--folder", "--model"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(SETTINGS))
        return
    if arguments.make:
        print(model_of(arguments.make, Path(arguments.folder)))
        return
    if arguments.child:
        print(json.dumps(child(*arguments.child, arguments.model, Path(arguments.folder))))
        return
    found = {}
    columns = ["setting", "memory, GB, planned / measured", "tokens/s, planned / measured", "misses"]
    if arguments.memory:
        del columns[2]
    table = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for name in arguments.only or SETTINGS:
        found[name] = compared(name, speed=not arguments.memory)
        table.append(line(name, found[name]))
        print(table[-1], f"planned in {found[name]['planned']['planning']:.1f} s", file=sys.stderr, flush=True)
    print("\n".join(table))
    print(json.dumps({"settings": found}))


if __name__ == "__main__":
    main()
