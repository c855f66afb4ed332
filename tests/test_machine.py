"""What this machine can do is found out, and asked for by name."""

import os
import platform
import resource
import subprocess
import sys

import pytest
import torch

from lorakit import machine
from lorakit.errors import ConfigError


def test_auto_device_is_one_that_computes():
    device = machine.resolve_device("auto")
    assert float(torch.ones(2, device=device).sum()) == 2


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "CPU"])
def test_a_device_that_is_not_here_is_refused_with_those_that_are(name):
    with pytest.raises(ConfigError, match=r"this torch can use .*cpu"):
        machine.resolve_device(name)


def test_dtypes_by_name():
    cpu = torch.device("cpu")
    assert [machine.resolve_dtype(name, cpu) for name in ("fp32", "bf16", "fp16")] == [
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ]
    for spelling in ("bfloat16", "torch.bfloat16", torch.bfloat16):
        assert machine.resolve_dtype(spelling, cpu) == torch.bfloat16
    assert machine.resolve_dtype("half", cpu) == torch.float16
    assert machine.resolve_dtype("auto", cpu) in (torch.float32, torch.bfloat16)
    with pytest.raises(ConfigError, match="unknown 'float8'"):
        machine.resolve_dtype("float8", cpu)
    with pytest.raises(ConfigError, match=r"unknown torch\.float64; allowed: auto, fp32"):
        machine.resolve_dtype(torch.float64, cpu)


@pytest.mark.parametrize(("speedup", "dtype"), [(4.5, torch.bfloat16), (0.6, torch.float32), (1.1, torch.float32)])
def test_bf16_only_where_it_is_measured_to_be_faster(monkeypatch, speedup, dtype):
    monkeypatch.setattr(machine, "_matmul_speedup", lambda dtype: speedup)
    machine.training_dtype.cache_clear()
    try:
        assert machine.training_dtype(torch.device("cpu")) == dtype
    finally:
        machine.training_dtype.cache_clear()


COUNT_FAULTS = """
import resource, sys
from lorakit import machine
if sys.argv[1] == "keep":
    assert machine.keep_freed_memory()
import torch
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 << 20, dtype=torch.uint8)  # freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(min(faults() for _ in range(20)))  # the first few may lie in parts of the heap not used yet
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives freed blocks back at once")
def test_freed_memory_is_kept_for_the_next_step():
    """64 MiB have 16,384 small pages or 32 huge ones; a block that was kept is there already."""

    def faults(how):
        command = [sys.executable, "-c", COUNT_FAULTS, how]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert resource.getpagesize() <= 65536
    assert faults("keep") == 0
    assert faults("give back") > 20


def test_few_kernels_are_kept_unless_the_user_has_said_how_many(monkeypatch):
    monkeypatch.delenv("LRU_CACHE_CAPACITY", raising=False)
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    machine.keep_few_kernels()
    assert os.environ["LRU_CACHE_CAPACITY"] == str(machine.MOST_KERNELS)
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7"
