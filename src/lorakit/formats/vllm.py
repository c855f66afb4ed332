"""A PEFT folder that vLLM serves with the right scale, and the command that does so.

vLLM reads one rank and one alpha for all layers and passes over `rank_pattern` and `alpha_pattern`; so scales are
folded into B and smaller ranks padded with zeros, which changes no update. Trained biases, `modules_to_save` and ranks
above 512 it refuses. Which of the remaining layers a model's class can adapt is for vLLM to say; it refuses by name,
too.
Checked against vLLM's main branch: lora/peft_helper.py, lora/lora_model.py, lora/utils.py, config/lora.py.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from lorakit import files
from lorakit.adapter.value import Adapter
from lorakit.formats import peft
from lorakit.formats.codec import Context, plain_layers, whole_tensors

COMMAND_FILE = "vllm-serve.txt"
MAX_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What --max-lora-rank accepts."""


def recognises(path: Path) -> bool:
    """Never: what is written here is a PEFT folder, and recognised as one."""
    return False


def obstacles(adapter: Adapter, context: Context) -> list[str]:
    """Biases and modules, layers that are neither linear nor the token embedding, and large ranks."""
    problems = whole_tensors(adapter, "vLLM") + plain_layers(adapter, "vLLM")
    for path, f in adapter.factors.items():
        if f.kind == "convolution":
            problems.append(f"{path}: a convolution, which vLLM does not adapt")
        elif f.kind == "embedding" and path.rsplit(".", 1)[-1] != "embed_tokens":
            problems.append(f"{path}: vLLM adapts no embedding but that of tokens (embed_tokens)")
        if f.r > MAX_RANKS[-1]:
            problems.append(f"{path}: rank {f.r}; vLLM serves at most {MAX_RANKS[-1]}: compress the adapter first")
    return problems or peft.obstacles(adapter.folded(uniform_rank=True), context)


def write(adapter: Adapter, folder: Path, context: Context) -> Path:
    """Write the PEFT folder and, last, a file with the command; return the folder."""
    uniform = adapter.folded(uniform_rank=True)
    peft.write(uniform, folder, context)
    files.write_text(folder / COMMAND_FILE, serve_command(uniform, folder, context) + "\n")
    return folder


def serve_command(adapter: Adapter, folder: Path, context: Context) -> str:
    """The command that serves the adapter in `folder` under the folder's name, beside its base."""
    known_as = (adapter.base.published or adapter.base.name) if adapter.base else None
    reference = context.base_reference
    if reference is None or (reference.endswith(".gguf") and known_as):  # vLLM takes no adapters on a GGUF file
        reference = known_as or "BASE_MODEL"
    base = shlex.quote(reference)
    rank = next(limit for limit in MAX_RANKS if limit >= max(f.r for f in adapter.factors.values()))
    folder = folder.absolute()
    module = shlex.quote(f"{folder.name}={folder}")
    return f"vllm serve {base} --enable-lora --lora-modules {module} --max-lora-rank {rank}"


def read(path: Path, context: Context) -> Adapter:
    """Read the PEFT folder."""
    return peft.read(path, context)
