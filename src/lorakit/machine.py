"""What this machine can do: its device, and the dtype that is fast on it. Knows no model."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import sys
import time
from pathlib import Path

import torch

from lorakit.config import dtype_name
from lorakit.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MOST_KERNELS = 256  # kept by oneDNN; its own bound is 1,024


def resolve_device(name: str = "auto") -> torch.device:
    """`auto` is CUDA, else MPS, else the CPU; any other name must be a device that is here.

    Raises:
        ConfigError: torch cannot use the named device; says which ones it can.
    """
    available = ["cpu"]
    if torch.cuda.is_available():
        available = [f"cuda:{i}" for i in range(torch.cuda.device_count())] + available
    if torch.backends.mps.is_available():
        available = ["mps", *available]
    if name == "auto":
        return torch.device(available[0])
    if name not in available and not (name == "cuda" and "cuda:0" in available):
        raise ConfigError(f"device: {name!r} is not here; this torch can use {', '.join(available)} (or auto)")
    return torch.device(name)


def resolve_dtype(name: str | torch.dtype, device: torch.device) -> torch.dtype:
    """`auto` asks `training_dtype`; else fp32, bf16 or fp16 as named, in any spelling of `config.dtype_name`.

    Raises:
        ConfigError: an unknown name.
    """
    known = dtype_name(name)
    if known == "auto":
        return training_dtype(device)
    if known not in DTYPES:
        raise ConfigError(f"dtype: unknown {name!r}; allowed: auto, {', '.join(DTYPES)}")
    return DTYPES[known]


@functools.cache
def training_dtype(device: torch.device) -> torch.dtype:
    """The dtype for the frozen base that is fastest here without losing range.

    CUDA: bf16 where the GPU computes in it, else fp16 (a T4: bf16 is emulated there, and slow). CPU: bf16 only if a
    matrix product in it is measured to be clearly faster than in fp32; without AVX512-BF16 or AMX it is slower. MPS:
    bf16 if the system has it.
    """
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if native else torch.float16
    if device.type == "mps":
        try:
            torch.ones(8, 8, device=device, dtype=torch.bfloat16).matmul(
                torch.ones(8, 8, device=device, dtype=torch.bfloat16)
            )
        except (RuntimeError, TypeError):
            return torch.float32
        return torch.bfloat16
    keep_few_kernels()
    return torch.bfloat16 if _matmul_speedup(torch.bfloat16) > 1.3 else torch.float32


def _matmul_speedup(dtype: torch.dtype, than: torch.dtype = torch.float32) -> float:
    """How many times faster a CPU matrix product of a layer's size is in `dtype` than in another one.

    The best of many each, in turns, so that a busy neighbour disturbs both alike (about 50 ms).
    """
    operands = {each: (torch.ones(256, 768, dtype=each), torch.ones(1536, 768, dtype=each)) for each in (than, dtype)}
    best = dict.fromkeys(operands, float("inf"))
    for _ in range(16):
        for each, (x, w) in operands.items():
            multiply = torch._int_mm if each == torch.int8 else torch.matmul
            start = time.perf_counter()
            multiply(x, w.T)
            best[each] = min(best[each], time.perf_counter() - start)
    return best[than] / best[dtype]


@functools.cache
def int8_speedup(dtype: torch.dtype) -> float:
    """How many times faster a CPU matrix product in 8-bit integers is than in `dtype`; it needs a processor with
    instructions for it (VNNI, AMX) to be faster at all.
    """
    return _matmul_speedup(torch.int8, dtype)


def resident_memory() -> int:
    """Bytes of memory this process holds now; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def peak_memory(device: torch.device | str) -> int | None:
    """Most bytes that this process has held: on a GPU what torch's tensors took, else of main memory; None where that
    is not told (Windows).
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_for(device: torch.device | str) -> int | None:
    """Bytes a run on this device can have, what this process holds already included; None where nobody says."""
    device = torch.device(device)
    free = free_memory(device)
    return free if free is None or device.type == "cuda" else free + resident_memory()


def free_memory(device: torch.device | str) -> int | None:
    """Bytes that can still be had on this device; None where nobody says."""
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return available_memory() if device.type == "cpu" else None


def available_memory() -> int | None:
    """Bytes that can be had without swapping, as the system estimates them; None where it does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def keep_few_kernels() -> None:
    """Have oneDNN, and torch in front of it, keep few of the kernels they make for each shape of a product in bf16.
    Process-wide; heeded where no such product has run yet.

    Each step has another number of tokens and so brings dozens of new shapes, of 0.65 MB each; of those of steps before
    none is met again. What the user has set in the environment stays.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(MOST_KERNELS))


@functools.cache
def keep_freed_memory() -> bool:
    """Have the C library keep freed blocks for the next step, in huge pages. Process-wide; call it before a model is
    loaded, so that its weights lie there too.

    glibc gives each big block back to the system when it is freed, and touching its pages anew cost a fifth of a
    training step; in 2 MiB pages the processor finds what it reads a tenth faster (docs/log.md: page faults). The
    process then holds its peak until it ends, which it needs again in the next step.

    Returns:
        Whether this C library can be told (glibc on Linux; elsewhere nothing is done).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # of malloc.h
    never_mapped = libc.mallopt(mmap_threshold, 2**31 - 1) or libc.mallopt(mmap_max, 0)  # old glibc: at most 32 MiB
    if not (never_mapped and libc.mallopt(trim_threshold, -1)):
        return False
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    page, huge_pages = os.sysconf("SC_PAGE_SIZE"), 14  # MADV_HUGEPAGE of mman.h
    memory = page * os.sysconf("SC_PHYS_PAGES")
    # Room the heap will grow into: only addresses, until something is written there.
    room = [libc.malloc(2**30) for _ in range(min(8, memory // 2**31))]
    for block in room:
        if block is not None:
            start = -(-block // page) * page
            libc.madvise(start, 2**30 - page, huge_pages)  # a kernel without them says so, and nothing is lost
    for block in reversed(room):
        libc.free(block)
    return True
