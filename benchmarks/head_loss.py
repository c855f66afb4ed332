"""The loss fused with the output head against the same by way of all logits, forward and backward, in turn, on this
machine.

Prints one JSON object: for each way the median seconds, the fastest, and the bytes of logits that are there at once;
the ratio of the medians; and how far the two gradients differ.

    python benchmarks/head_loss.py [--places 400] [--vocabulary 49152] [--width 576] [--dtype fp32] [--pairs 15]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
import torch.nn.functional as F

from lorakit import machine
from lorakit.core.cross_entropy import cross_entropy_sum, linear_cross_entropy_sum, rows_at_once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--places", type=int, default=400)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--dtype", choices=sorted(machine.DTYPES), default="fp32")
    parser.add_argument("--pairs", type=int, default=15)
    arguments = parser.parse_args()
    machine.keep_freed_memory()  # as `train` does
    torch.manual_seed(0)
    dtype = machine.DTYPES[arguments.dtype]
    W = (torch.randn(arguments.vocabulary, arguments.width) / arguments.width**0.5).to(dtype)
    states = torch.randn(arguments.places, arguments.width).to(dtype)
    targets = torch.randint(0, arguments.vocabulary, (arguments.places,))

    def by_logits(x: torch.Tensor) -> torch.Tensor:
        return cross_entropy_sum(F.linear(x, W), targets, overwrite=True)

    def fused(x: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy_sum(x, W, None, targets)

    seconds: dict[str, list[float]] = {"logits": [], "fused": []}
    gradients = {}
    for pair in range(arguments.pairs + 1):  # the first one touches the memory that the others will have
        ways = [("logits", by_logits), ("fused", fused)]
        for name, way in ways if pair % 2 else reversed(ways):
            x = states.clone().requires_grad_()
            start = time.perf_counter()
            (way(x) / arguments.places).backward()
            if pair > 0:
                seconds[name].append(time.perf_counter() - start)
            gradients[name] = x.grad.float()
    row = arguments.vocabulary * W.element_size()
    sizes = {"logits": arguments.places * row, "fused": rows_at_once(arguments.places, W) * row}
    told = {
        name: {
            "median_s": round(statistics.median(taken), 4),
            "fastest_s": round(min(taken), 4),
            "logits_bytes": sizes[name],
        }
        for name, taken in seconds.items()
    }
    difference = (gradients["fused"] - gradients["logits"]).norm() / gradients["logits"].norm()
    ratio = told["fused"]["median_s"] / told["logits"]["median_s"]
    print(json.dumps({**told, "ratio": round(ratio, 3), "gradient_difference": float(difference)}))


if __name__ == "__main__":
    main()
