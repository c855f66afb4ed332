"""Training with lorakit against TRL's SFTTrainer and transformers' Trainer, both over PEFT, on this machine.

All sides: the same base, the same adapter to start from (rank 8, all linear layers), the same token ids and labels in
the same steps, AdamW with the same rates, gradients clipped alike, the same dtype. Each side runs in a process of its
own, so that peak memory is its own; the first step is left out; losses of all steps are printed, and the run fails
where the sides do not agree on the first: nobody can be faster by doing less. TRL runs in the fastest of its ways
(padded, padding-free, packing, micro-batches, kinds of attention), which is searched first for short rows and for long
ones. A step of ours is also taken without shared beginnings, and beside it the frozen products of that very step alone
(x W^T and g W): the floor. At last a few settings of our side alone, where there should be no cliff.

Prints progress to stderr and one JSON object. Real tokens a second, without padding; peak memory of the whole process.

    python benchmarks/train_vs_trl.py [--only NAME ...] [--steps 2] [--dtype auto|fp32|bf16] [--thorough]

A NAME is one of those printed by --list, or any made the same way (0.5B-512-2048-tokens-full).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from versus.prepare import Setting, model_source, prepare, read_steps, starting_adapter

# Both models, short and long rows, few and many tokens a step, both losses: each at least once, not their product.
SETTINGS = (
    "135M-short-8-rows-completion",
    "135M-short-8-rows-full",
    "135M-short-2048-tokens-completion",
    "135M-512-2048-tokens-full",
    "0.5B-short-8-rows-completion",
)
# Where more sides run: transformers' Trainer, which is LLaMA-Factory's way and computes all logits at once, and, if
# another way of TRL is faster, TRL with a step as one padded batch: for its memory, since ours is one batch too.
MORE_SIDES = ("135M-short-8-rows-completion", "135M-512-2048-tokens-full")
ONE_BATCH = "padded"  # of TRL's ways
# Our side alone: name -> (setting, part, options)
ALONE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "fp32": ("135M-short-8-rows-completion", "train", {"dtype": "fp32"}),
    "bf16": ("135M-short-8-rows-completion", "train", {"dtype": "bf16"}),
    "dropout": ("135M-short-8-rows-completion", "train", {"dropout": 0.05}),
    "checkpointed": ("135M-4096-1-rows-full", "train", {"dtype": "fp32", "checkpointing": True}),
    "training": ("135M-512-8-rows-full", "train", {}),
    "evaluation": ("135M-512-8-rows-full", "evaluate", {}),  # 4,096 tokens at once, as many as a step of `training`
}
AGREE = {"fp32": 1e-4, "bf16": 2e-2}  # most that the first losses may differ by, of their size


def child(request: dict[str, Any]) -> dict[str, Any]:
    """One side's part, in a process of its own."""
    work, part = Path(request["work"]), request["part"]
    if part == "prepare":
        return prepare(work, [Setting.of(name) for name in request["names"]], request["dtype"], request["steps"])
    setting = Setting.of(request["name"])
    steps, source = read_steps(work, setting)[: request["steps"]], model_source(work, setting.model)
    if part in ("train", "floor", "evaluate"):
        from versus import ours

        return getattr(ours, part)(steps, source, **request["options"])
    from versus import theirs

    return getattr(theirs, part)(steps, source, starting_adapter(work, setting.model), **request["options"])


class Bench:
    """The parent: starts a process for each part and puts together what they say.

    Args:
        work: a folder for what the sides share.
        names: settings to compare in, and names of ALONE.
        dtype: auto, fp32 or bf16.
        steps: counted ones.
        thorough: search TRL's fastest way in every setting.
    """

    def __init__(self, work: Path, names: list[str], dtype: str, steps: int, thorough: bool) -> None:
        self.work, self.steps, self.thorough = work, steps, thorough
        self.compared = [name for name in names if name not in ALONE]
        self.alone = [name for name in names if name in ALONE]
        needed = {*self.compared, *(ALONE[name][0] for name in self.alone)}
        needed |= {self._searched_in(name).name for name in self.compared}
        self.facts = self._child("prepare", names=sorted(needed), dtype=dtype)
        self.dtype: str = self.facts["dtype"]
        self._ways: dict[str, dict[str, Any]] = {}

    def result(self) -> dict[str, Any]:
        """Everything asked for."""
        compared = {name: self._compare(name) for name in self.compared}
        return {**self.facts, "compared": compared, "alone": {name: self._alone(name) for name in self.alone}}

    def _compare(self, name: str) -> dict[str, Any]:
        ways = self._searched(name)
        best = max((way for way in ways if "error" not in ways[way]), key=lambda way: ways[way]["tokens_per_second"])
        sides = {
            "lorakit": self._child("train", name, dtype=self.dtype),
            "lorakit, nothing shared": self._child("floor", name, dtype=self.dtype),
            "TRL": {"way": best, **self._child("trl", name, dtype=self.dtype, way=best)},
        }
        if name in MORE_SIDES:
            if best != ONE_BATCH:
                sides["TRL, one batch"] = self._child("trl", name, dtype=self.dtype, way=ONE_BATCH)
            sides["transformers"] = self._child("plain", name, dtype=self.dtype)
        ours = sides["lorakit"]
        ratios = {
            side: {
                "speed": round(ours["tokens_per_second"] / result["tokens_per_second"], 2),
                "memory": round(ours["peak_gb"] / result["peak_gb"], 2),
            }
            for side, result in sides.items()
            if "lorakit" not in side
        }
        result = {**sides, "ratios": ratios, "losses": self._agreement(name, sides), "ways of TRL": ways}
        say(
            f"{name:34} lorakit {ours['tokens_per_second']:6.1f} tokens/s {ours['peak_gb']:5.2f} GB   "
            f"TRL ({best}) {sides['TRL']['tokens_per_second']:6.1f} tokens/s {sides['TRL']['peak_gb']:5.2f} GB   "
            f"speed x {ratios['TRL']['speed']}, memory x {ratios['TRL']['memory']}, "
            f"step / floor {sides['lorakit, nothing shared']['floor_ratio']}"
        )
        return result

    def _agreement(self, name: str, sides: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """How far the losses of all sides lie apart, of their size: in the first step, and at most."""
        steps = list(zip(*(side["losses"] for side in sides.values()), strict=True))
        apart = [(max(losses) - min(losses)) / max(losses) for losses in steps]
        if apart[0] > AGREE[self.dtype]:
            each = {side: result["losses"][0] for side, result in sides.items()}
            raise SystemExit(f"{name}: the sides do not train the same, their first losses are {each}")
        return {"apart in step 1": float(f"{apart[0]:.2g}"), "apart at most": float(f"{max(apart):.2g}")}

    def _searched_in(self, name: str) -> Setting:
        """Where TRL's fastest way for a setting is looked for: the cheapest setting with such rows."""
        setting = Setting.of(name)
        step = "8-rows" if setting.rows == "short" else "2-rows"
        return setting if self.thorough else replace(setting, model="135M", step=step, loss="completion")

    def _searched(self, name: str) -> dict[str, Any]:
        place = self._searched_in(name).name
        if place not in self._ways:
            self._ways[place] = self._child("search", place, steps=2, dtype=self.dtype)
            for way, result in self._ways[place].items():
                say(f"  TRL, {way}: {result.get('tokens_per_second') or result['error']}")
        return self._ways[place]

    def _alone(self, name: str) -> dict[str, Any]:
        setting, part, options = ALONE[name]
        result = {"setting": setting, **self._child(part, setting, steps=2, **{"dtype": self.dtype, **options})}
        say(f"{name:12} {setting:34} {result['tokens_per_second']:6.1f} tokens/s {result['peak_gb']:5.2f} GB")
        return result

    def _child(self, part: str, name: str = "", *, steps: int | None = None, **options: Any) -> dict[str, Any]:
        request = {"part": part, "work": str(self.work), "steps": 1 + self.steps if steps is None else steps}
        request |= options if part == "prepare" else {"name": name, "options": options}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", __file__, "--child", json.dumps(request)],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{done.stderr}\n{part} of {name or 'all'} ended with {done.returncode} (see above)")
        return json.loads(done.stdout.splitlines()[-1])


def say(line: str) -> None:
    """Progress, for people."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Compare in every setting asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[*SETTINGS, *ALONE], metavar="NAME")
    parser.add_argument("--steps", type=int, default=2, help="steps that count, after one to warm up")
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="of the base")
    parser.add_argument("--thorough", action="store_true", help="search TRL's fastest way in every setting")
    parser.add_argument("--list", action="store_true", help="names for --only, and end")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error("--steps: at least 1")
    if arguments.list:
        print("\n".join((*SETTINGS, *ALONE)))
    elif importlib.util.find_spec("trl") is None:
        raise SystemExit("TRL is not installed here: pip install -c constraints.txt -e '.[bench]' (make bench does it)")
    elif arguments.child:
        print(json.dumps(child(json.loads(arguments.child))))
    else:
        with tempfile.TemporaryDirectory() as work:
            bench = Bench(Path(work), arguments.only, arguments.dtype, arguments.steps, arguments.thorough)
            print(json.dumps(bench.result()))


if __name__ == "__main__":
    main()
