"""A training step with frozen products in 8-bit integers against the same step with exact ones, in turn.

SmolLM2-135M, rank 8 on all linear layers, the demo's task or the rows of --data. Each step is computed both ways from
the same adapter, which then goes on by the exact gradient. Prints one JSON object: median seconds of each, their ratio,
seconds and bytes of making the integer copies, and how far gradients (relative error) and losses are from exact.

    python benchmarks/frozen_products.py [--steps 8] [--rows 16] [--dtype fp32] [--data train.jsonl]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--data")
    arguments = parser.parse_args()

    import torch

    import lorakit
    from lorakit import LoRAConfig, TrainConfig, machine
    from lorakit.demo.orders import make_orders
    from lorakit.training.loop import Plan, accumulate, ready
    from lorakit.training.optim import clip_gradients, make_optimizer, make_scaler
    from lorakit.training.products import products_bytes
    from lorakit.training.run import read

    with tempfile.TemporaryDirectory() as folder:
        orders = Path(folder) / "orders.jsonl"
        rows = (arguments.steps + 1) * arguments.rows + 32
        orders.write_text("".join(json.dumps(order.row()) + "\n" for order in make_orders("train", rows, 0)))
        settings = {"model": "smollm2", "data": arguments.data or str(orders), "batch_size": arguments.rows}
        config = TrainConfig.from_dict({**settings, "learning_rate": 1e-3, "micro_batch_tokens": 1 << 20})
        examples = read(config).train.examples
    machine.keep_freed_memory()
    model, _ = lorakit.load_model("smollm2", dtype=arguments.dtype)
    tensors = lorakit.attach(model, LoRAConfig(r=8)).trainable_tensors()
    optimizer, scaler = make_optimizer(config, tensors), make_scaler(model.dtype, model.device)
    seconds: dict[str, list[float]] = {"exact": [], "int8": []}
    making, errors, losses = [], [], []
    for number, step in zip(range(arguments.steps + 1), Plan.of(config, examples).steps(0), strict=False):
        gradients, own = {}, {}
        for kind in ("int8", "exact"):  # the optimiser goes on by the last one
            optimizer.zero_grad(set_to_none=True)
            start = time.perf_counter()
            with ready(model, config.max_length, kind) as share:
                entered = time.perf_counter()
                own[kind] = accumulate(model, examples, step, scaler, 0, number, share=share)
                ended = time.perf_counter()
            gradients[kind] = torch.cat([tensor.grad.flatten() for tensor in tensors.values()])
            if number > 0:  # the first one touches the memory
                seconds[kind].append(ended - entered)
                if kind == "int8":
                    making.append(entered - start)
        if number > 0:
            errors.append(float((gradients["int8"] - gradients["exact"]).norm() / gradients["exact"].norm()))
            losses.append(own["int8"] - own["exact"])
        clip_gradients(tensors, 1.0)
        optimizer.step()
    exact, int8 = (statistics.median(seconds[kind]) for kind in ("exact", "int8"))
    print(
        json.dumps(
            {
                "dtype": str(model.dtype),
                "seconds": seconds,
                "exact": exact,
                "int8": int8,
                "speed_ratio": round(exact / int8, 2),
                "making_seconds": statistics.median(making),
                "bytes": products_bytes(model, "int8"),
                "gradient_errors": errors,
                "loss_differences": losses,
            }
        )
    )


if __name__ == "__main__":
    main()
