"""A tiny task, and what tests of runs ask about a run folder."""

import json
import os
import signal

from lorakit.files import JsonLines
from lorakit.training.config import TrainConfig
from lorakit.training.events import StepDone
from tiny_models import byte_tokenizer, tiny_llama

COLOURS = ("red", "green", "blue", "amber", "teal", "pink", "grey", "lime", "gold", "rust")


def rows(count, start=0):
    """Questions with answers of different length."""
    for i in range(start, start + count):
        first, second = COLOURS[i % 10], COLOURS[(i // 10 + i) % 10]
        answer = f"{second} {first}" + "!" * (i % 4)
        question = f"{i}: {first} {second}?"
        yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_rows(path, found):
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def save_base(folder):
    """A Llama of 2 layers with a byte tokenizer and the ChatML template."""
    tiny_llama(context=512).save_pretrained(folder)
    byte_tokenizer(eos="<|im_end|>").save_pretrained(folder)
    return folder


def save_data(folder):
    """(training file of 40 rows, validation file of 6)."""
    return write_rows(folder / "train.jsonl", rows(40)), write_rows(folder / "valid.jsonl", rows(6, start=1000))


class StopAt:
    """Interrupts the run, as Ctrl-C would, when a step is done."""

    def __init__(self, step):
        self.step = step

    def __call__(self, event):
        if isinstance(event, StepDone) and event.step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def configured(settings, output, **changes):
    return TrainConfig.from_dict({**settings, "output": str(output), **changes})


def metrics(folder):
    """Rows of metrics.jsonl without the wall clock."""
    found = JsonLines(folder / "metrics.jsonl").rows()
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found]


def adapter_bytes(folder, which):
    return (folder / which / "adapter_model.safetensors").read_bytes()


def assert_same_run(one, other):
    assert metrics(one) == metrics(other)
    for which in ("best", "last"):
        assert adapter_bytes(one, which) == adapter_bytes(other, which)
    assert json.loads((one / "samples.json").read_text()) == json.loads((other / "samples.json").read_text())
