"""What holding and switching adapters costs, against PEFT, with 1, 2, 33 and 300 of them resident.

224 linear layers of 16 x 16 (so that what is measured is bookkeeping, not arithmetic), rank-8 adapters on all of them,
both libraries in one process on the same files. Every figure is the median of several calls in milliseconds. PEFT's
loading grows with what is resident (300 would take most of an hour), so beyond 40 its residents are put into its layers
directly, by the method its own loading calls; the last one is loaded in full, and timed.
Prints one JSON object.

    python benchmarks/lifecycle.py [--residents 1,2,33,300,1000] [--peft-residents 1,2,33,300]
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import shutil
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch import nn

import lorakit
from lorakit import LoRAConfig

LAYERS, WIDTH, RANK, ROWS = 224, 16, 8, 8


class Stack(nn.Module):
    """Linear layers one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, WIDTH) -> (N, WIDTH)."""
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def timed(action, repeats: int = 5) -> float:
    """Median milliseconds of a call, after one that is not counted."""
    action()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        taken.append(1000 * (time.perf_counter() - start))
    return statistics.median(taken)


def once(action) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    action()
    return 1000 * (time.perf_counter() - start)


def make_files(folder: Path) -> list[Path]:
    """Nine saved adapters; the many residents are these under many names."""
    torch.manual_seed(0)
    model = Stack()
    paths = []
    for i in range(9):
        handle = lorakit.attach(model, LoRAConfig(r=RANK), seed=i)
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for tensor in handle.trainable_parameters():
                tensor.add_(torch.empty(tensor.shape).normal_(0, 0.1, generator=generator))
        paths.append(handle.save("default", folder / str(i)))
        handle.detach()
    return paths


def lorakit_times(paths: list[Path], residents: int, scratch: Path) -> tuple[dict[str, float], torch.Tensor]:
    """All figures of our side, and a mixed batch's result."""
    torch.manual_seed(0)
    model, x = Stack().eval(), torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    attaching = once(lambda: lorakit.attach(model, paths[0], name="0"))
    handle, last = lorakit.adapters(model), str(residents - 1)
    for i in range(1, residents - 1):
        handle.load(paths[i % len(paths)], name=str(i))
    figures = {"load": attaching if last == "0" else once(lambda: handle.load(paths[-1], name=last))}
    names = [str(i % min(max(residents - 1, 1), ROWS)) for i in range(ROWS)]

    def disable() -> None:
        with handle.disabled():
            pass

    def route() -> None:
        with handle.route(names):
            pass

    with torch.inference_mode():
        figures |= {"activate": timed(lambda: handle.activate("0")), "disabled": timed(disable), "route": timed(route)}
        figures["forward"] = timed(lambda: model(x))
        with handle.route(names):
            figures["mixed batch"] = timed(lambda: model(x))
            mixed = model(x)
        with handle.merged():
            figures["forward, merged"] = timed(lambda: model(x))
        with handle.disabled():
            figures["forward, base"] = timed(lambda: model(x))
    figures["save"] = timed(lambda: handle.save("0", scratch / "ours"), 3)

    def merged() -> None:
        with handle.merged():
            pass

    figures["merge and back"] = timed(merged, 3)
    figures["remove"] = once(lambda: handle.remove(last))
    return figures, mixed


_LOADED_BY_PEFT = 40


def put_into_peft(model, name: str) -> None:
    """Make a fresh adapter resident without walking what is resident already for every layer."""
    from peft.tuners.lora import LoraLayer

    model.peft_config[name] = copy.deepcopy(model.peft_config["a0"])
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.update_layer(name, RANK, lora_alpha=32, config=model.peft_config[name])
            for parameters in (module.lora_A[name], module.lora_B[name]):
                parameters.requires_grad_(False)


def peft_times(paths: list[Path], residents: int, scratch: Path) -> tuple[dict[str, float], torch.Tensor]:
    """The same with PEFT."""
    from peft import PeftModel

    torch.manual_seed(0)
    base, x = Stack().eval(), torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    plain = copy.deepcopy(base)
    start = time.perf_counter()
    model, last = PeftModel.from_pretrained(base, paths[0], adapter_name="a0"), f"a{residents - 1}"
    attaching = 1000 * (time.perf_counter() - start)
    for i in range(1, residents - 1):
        if i < _LOADED_BY_PEFT:
            model.load_adapter(paths[i % len(paths)], adapter_name=f"a{i}")
        else:
            put_into_peft(model, f"a{i}")
    figures = {"load": attaching if last == "a0" else once(lambda: model.load_adapter(paths[-1], adapter_name=last))}
    names = [f"a{i % min(max(residents - 1, 1), ROWS)}" for i in range(ROWS)]

    def disable() -> None:
        with model.disable_adapter():
            pass

    model.eval()
    with torch.inference_mode():
        figures |= {"activate": timed(lambda: model.set_adapter("a0")), "disabled": timed(disable)}
        figures["forward"] = timed(lambda: model(x))
        mixed = model(x, adapter_names=names)
        figures["mixed batch"] = timed(lambda: model(x, adapter_names=names))
        figures["forward, base"] = timed(lambda: plain(x))
    figures["save"] = timed(lambda: model.save_pretrained(scratch / "theirs", selected_adapters=["a0"]), 3)

    def merged() -> None:
        model.merge_adapter()
        model.unmerge_adapter()

    figures["merge and back"] = timed(merged, 3)
    figures["remove"] = once(lambda: model.delete_adapter(last))
    return figures, mixed


def main() -> None:
    """Run both sides at each number of residents."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--residents", default="1,2,33,300,1000")
    parser.add_argument("--peft-residents", default="1,2,33,300")
    arguments = parser.parse_args()
    ours, theirs = ([int(n) for n in text.split(",") if n] for text in vars(arguments).values())
    scratch = Path(tempfile.mkdtemp())
    result: dict[str, object] = {"layers": LAYERS, "rank": RANK, "unit": "ms", "threads": torch.get_num_threads()}
    try:
        paths = make_files(scratch / "adapters")
        for residents in ours:
            figures, mixed = lorakit_times(paths, residents, scratch)
            row: dict[str, object] = {"lorakit": figures}
            if residents in theirs:
                with warnings.catch_warnings(), contextlib.redirect_stdout(None):
                    warnings.simplefilter("ignore")
                    peft, peft_mixed = peft_times(paths, residents, scratch)
                # the same batch through the same adapters: nobody is faster by doing less
                assert torch.allclose(mixed, peft_mixed, atol=1e-5)
                row |= {"peft": peft, "ratio": {key: peft[key] / figures[key] for key in peft}}
            result[str(residents)] = row
    finally:
        shutil.rmtree(scratch)
    print(json.dumps(result, indent=2, default=lambda value: round(value, 3)))


if __name__ == "__main__":
    main()
