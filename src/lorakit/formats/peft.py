"""PEFT's adapter folder: `adapter_config.json` and `adapter_model.safetensors`.

Tensor names are `base_model.model.<path>.` and then: `lora_A.weight`, `lora_B.weight` and, with `lora_bias`,
`lora_B.bias`; `lora_embedding_A`, `lora_embedding_B`; DoRA's `lora_magnitude_vector`; `base_layer.bias` or `bias` for
trained biases; the module's own names for `modules_to_save`. Those of attentions and experts: `peft_nested`; of soft
prompts, and of adapters that have both: `peft_prompt`. What this version does not know is refused by name: a setting
that is ignored may be the one that scales the update.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lorakit.adapter.config import LoRAConfig
from lorakit.adapter.naming import names_alone
from lorakit.adapter.value import NO_LAYERS, Adapter, BaseInfo, Factors, Kind
from lorakit.errors import AdapterFileError, ConfigError, FileError, bullet_list
from lorakit.files import (
    parse_json,
    read_json,
    read_safetensors,
    read_safetensors_header,
    write_json,
    write_safetensors,
)
from lorakit.formats import peft_nested, peft_prompt
from lorakit.formats.codec import Context, our_metadata, read_our_metadata
from lorakit.formats.peft_nested import by_pattern

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_BESIDE = "lorakit_peft"
_TOKENS = ".token_adapter.trainable_tokens_delta"  # the new rows, whatever the name says
_LORA_KEY = re.compile(
    r"(?P<path>.+)\.(?:lora_(?P<matrix>[AB])\.weight|lora_embedding_(?P<embedding>[AB])|lora_(?P<bias>B\.bias)"
    r"|lora_(?P<magnitude>magnitude)_vector(?:\.weight)?)"
)
_IN_FILE = {"magnitude": "magnitude_vector"}

# adapter_config.json: what says nothing about the function of the adapter ...
_NEUTRAL = {
    *(
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_type",
        "peft_version",
        "revision",
        "task_type",
    ),
    *("megatron_config", "megatron_core", "fan_in_fan_out", "layers_pattern", "runtime_config", "ensure_weight_tying"),
    *("lora_ga_config", "corda_config", "eva_config", "loftq_config", "kasa_config", "qalora_group_size"),
}
# ... and what this codec reads. Any other key must hold a value that switches its feature off.
_READ = {
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "bias"),
    *("modules_to_save", "layers_to_transform", "use_rslora", "init_lora_weights", "target_parameters"),
    *("trainable_token_indices", "lora_bias", "use_dora", "alora_invocation_tokens"),
}
_OFF: tuple[Any, ...] = (None, False, {}, [], "")
# initialisations that left the base as it was, so that the adapter means the same on it
_INIT_ON_PRISTINE_BASE = {
    True: "default",
    False: "random",
    "gaussian": "gaussian",
    "orthogonal": "orthogonal",
    "eva": "default",
}
_INIT_FOR_PEFT: dict[str, bool | str] = {
    "default": True,
    "random": False,
    "gaussian": "gaussian",
    "orthogonal": "orthogonal",
}

_TASK_TYPES = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


def recognises(path: Path) -> bool:
    """A folder with an adapter_config.json or a manifest of two parts, or a file beside one."""
    folder = path if path.is_dir() else path.parent
    return is_folder(folder) and (path.is_dir() or path.name in (CONFIG_FILE, TENSOR_FILE, peft_prompt.MANIFEST))


def is_folder(folder: Path) -> bool:
    """Whether a folder says that it is an adapter."""
    return (folder / CONFIG_FILE).is_file() or (folder / peft_prompt.MANIFEST).is_file()


# ---------------------------------------------------------------- writing


def obstacles(adapter: Adapter, context: Context) -> list[str]:
    """What the format cannot carry: which of several parameters of a module is whose, where these are not experts'."""
    return [
        f"{module}: factors of several of its parameters, whose order the file has no place for"
        for module in peft_nested.without_order(adapter.factors)
    ]


def write(adapter: Adapter, folder: Path, context: Context) -> Path:
    """Write both files into `folder` (created if need be), the config last; return the folder. Of an adapter with
    low-rank updates and a soft prompt, each into a folder of its own in there, the manifest last.

    Raises:
        AdapterFileError: the folder holds an adapter of the other form, which would be there still.
    """
    both = adapter.prompt is not None and adapter.config.target_modules != "none"
    other = folder / (CONFIG_FILE if both else peft_prompt.MANIFEST)
    if other.exists():
        raise AdapterFileError(f"{folder}: holds another adapter ({other.name}); choose another folder")
    if both:
        for part, name in ((adapter.without_prompt(), "lora"), (adapter.prompt_alone(), "prompt")):
            write(part, folder / peft_prompt.PARTS[name], context)
        peft_prompt.write_manifest(folder)
        return folder
    adapter = peft_nested.evened(adapter)
    metadata = {"format": "pt", "lorakit": our_metadata(adapter)}
    if adapter.prompt is not None:
        write_safetensors(folder / TENSOR_FILE, {peft_prompt.TENSOR: adapter.prompt.values}, metadata)
        write_json(folder / CONFIG_FILE, peft_prompt.config_for_peft(adapter.prompt, adapter.base))
        return folder
    write_safetensors(folder / TENSOR_FILE, _named_tensors(adapter), {**metadata, **_beside(adapter)})
    write_json(folder / CONFIG_FILE, _config_for_peft(adapter))
    return folder


def _named_tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    names = peft_nested.names(adapter.factors)
    for path, f in adapter.factors.items():
        if f.kind == "embedding":
            tensors |= {f"{path}.lora_embedding_A": f.A, f"{path}.lora_embedding_B": f.B}
        else:
            A, B = peft_nested.flat(f) if f.kind == "experts" else (_ungrouped(f), peft_nested.halved(path, f))
            tensors |= {f"{names[path]}.lora_A.weight": A, f"{names[path]}.lora_B.weight": B}
            tensors |= {} if f.bias is None else {f"{names[path]}.lora_B.bias": f.bias}
        if f.magnitude is not None:  # PEFT broadcasts a convolution's over its output
            shape = (1, -1, *[1] * (f.B.ndim - 2)) if f.kind == "convolution" else (-1,)
            tensors[f"{names[path]}.lora_magnitude_vector"] = f.magnitude.view(shape)
    for path, bias in adapter.biases.items():
        tensors[peft_nested.bias_name(path, adapter.factors)] = bias
    tensors |= {path + _TOKENS: rows for path, rows in adapter.tokens.items()}
    return {_PREFIX + name: tensor for name, tensor in (tensors | dict(adapter.replaced)).items()}


def _ungrouped(f: Factors) -> torch.Tensor:
    """PEFT's A reads all input channels even where the convolution is grouped: spread each group's rows over zeros,
    exactly.
    """
    groups = f.r // f.B.shape[1]
    if f.kind != "convolution" or groups == 1:
        return f.A
    rows, width = f.r // groups, f.A.shape[1]
    wide = f.A.new_zeros(f.r, width * groups, *f.A.shape[2:])
    for g in range(groups):
        wide[g * rows : (g + 1) * rows, g * width : (g + 1) * width] = f.A[g * rows : (g + 1) * rows]
    return wide


def _config_for_peft(adapter: Adapter) -> dict[str, Any]:
    config, base = adapter.config, adapter.base
    architecture = base.architecture if base else ""
    ranks, alphas = _patterns(adapter)
    return {
        "auto_mapping": None,
        "base_model_name_or_path": (base.published or base.name) if base else None,
        "bias": config.bias,
        "fan_in_fan_out": architecture.startswith("GPT2"),
        "inference_mode": True,
        "init_lora_weights": _init_for_peft(config),
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout,
        **({"lora_bias": True} if config.lora_bias else {}),  # older PEFTs do not know the key, nor the next one
        **({"alora_invocation_tokens": invocation} if (invocation := list(config.alora_invocation_tokens)) else {}),
        "modules_to_save": list(config.modules_to_save) or None,
        "peft_type": "LORA",
        "r": config.r,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "revision": None,
        "trainable_token_indices": list(config.trainable_tokens) or None,
        "task_type": next((task for end, task in _TASK_TYPES.items() if architecture.endswith(end)), None),
        "use_dora": config.delta == "dora",
        "use_rslora": config.scaling == "rslora",
        **peft_nested.settings(adapter),
    }


def _init_for_peft(config: LoRAConfig) -> bool | str:
    """How the tensors began says nothing once they are there, and PEFT would ask for data, or change the base."""
    return _INIT_FOR_PEFT.get(config.init, True)


def _patterns(adapter: Adapter) -> tuple[dict[str, int], dict[str, float]]:
    """rank_pattern and alpha_pattern that give every factor its own r and alpha: the config's, with whole paths where
    they do not.
    """
    config = adapter.config
    ranks, alphas = dict(config.rank_pattern), dict(config.alpha_pattern)
    wrong_r, wrong_alpha = {}, {}
    for path, f in adapter.factors.items():
        known_as = peft_nested.attention_of(path, f.kind)
        ends = peft_nested.exactly(known_as, f.kind)
        if by_pattern(ranks, path, by_pattern(ranks, known_as, config.r)) != f.r:
            wrong_r[ends] = f.r
        if by_pattern(alphas, path, by_pattern(alphas, known_as, config.alpha)) != f.alpha:
            wrong_alpha[ends] = f.alpha
    return wrong_r | ranks, wrong_alpha | alphas  # the first pattern that matches counts, so whole paths come first


def _beside(adapter: Adapter) -> dict[str, str]:
    """What PEFT's config has no place for, as a string for the file's header; nothing where it has."""
    written, config = _config_for_peft(adapter), adapter.config.to_dict()
    own = {"target_modules": config["target_modules"], "exclude_modules": config["exclude_modules"]}
    own |= {"layers_to_transform": config["layers"], "target_parameters": config["target_parameters"] or None}
    own |= {"lora_dropout": config["dropout"], "init_lora_weights": _init_for_peft(adapter.config)}
    changed = {key: [written[key], value] for key, value in own.items() if written[key] != value}  # PEFT's, ours
    attentions = peft_nested.input_only(adapter)
    if not changed and not attentions:
        return {}
    return {_BESIDE: json.dumps({"config": changed, "attentions": attentions}, sort_keys=True)}


# ---------------------------------------------------------------- reading


def read(path: Path, context: Context) -> Adapter:
    """Read an adapter folder (or the tensor file inside one).

    Raises:
        AdapterFileError: a file is missing or damaged, a setting is not supported, a tensor has no meaning or no
        partner.
    """
    folder = path if path.is_dir() else path.parent
    if (folder / peft_prompt.MANIFEST).is_file():
        peft_prompt.read_manifest(folder)
        parts = {part: read(folder / name, context) for part, name in peft_prompt.PARTS.items()}
        return peft_prompt.joined(parts["lora"], parts["prompt"], folder)
    tensor_file = folder / TENSOR_FILE
    missing = [name for name in (CONFIG_FILE, TENSOR_FILE) if not (folder / name).is_file()]
    if missing:
        raise AdapterFileError(
            f"{folder}: not an adapter folder: {' and '.join(missing)} not in it{_what_is_there(folder)}"
        )
    try:
        values = read_json(folder / CONFIG_FILE)
        tensors, metadata = read_safetensors(tensor_file)
    except FileError as error:
        raise AdapterFileError(str(error)) from error
    base, extra = read_our_metadata(metadata.get("lorakit"), tensor_file)
    if base is None and isinstance(values, dict) and values.get("base_model_name_or_path"):
        base = BaseInfo(name=values["base_model_name_or_path"], architecture="", dtype="", structure="", samples=())
    if peft_prompt.is_prompt(values):
        prompt = peft_prompt.read_prompt(values, tensors, folder / CONFIG_FILE, tensor_file)
        return Adapter(config=NO_LAYERS, prompt=prompt, base=base, metadata=extra)
    known, attentions = _read_beside(metadata, tensor_file)
    written = values if isinstance(values, dict) else {}
    # where somebody has changed a setting since, it counts
    own = {key: ours for key, (theirs, ours) in known.items() if written.get(key) == theirs}
    config = read_config(written | own or values, folder / CONFIG_FILE)
    parameters = tuple(written.get("target_parameters") or ())
    adapter = _sort_tensors(tensors, config, tensor_file, parameters=parameters, attentions=attentions)
    adapter = replace(adapter, base=base, metadata=extra)
    if not peft_nested.adds_twice(values.get("peft_version")):
        return adapter
    return replace(adapter, factors=peft_nested.doubled(adapter.factors))


def base_name(folder: Path) -> str | None:
    """What lorakit calls the base of the adapter in `folder`, or None if it names none.

    `base_model_name_or_path` is for every tool. Where it is as we wrote it, our metadata know the alias, if the base
    was one; where somebody has changed it, it counts.

    Raises:
        FileError: a file cannot be read.
        AdapterFileError: our metadata are damaged.
    """
    if (folder / peft_prompt.MANIFEST).is_file():
        return base_name(folder / peft_prompt.PARTS["lora"])
    values, tensor_file = read_json(folder / CONFIG_FILE), folder / TENSOR_FILE
    named = values.get("base_model_name_or_path") if isinstance(values, dict) else None
    if named and tensor_file.is_file():
        ours, _ = read_our_metadata(read_safetensors_header(tensor_file)[1].get("lorakit"), tensor_file)
        if ours is not None and ours.published == named:
            return ours.name
    return str(named) if named else None


def _what_is_there(folder: Path) -> str:
    if not folder.is_dir():
        return ""
    if (folder / "adapter_model.bin").is_file():
        return (
            ". It holds adapter_model.bin, a pickle, which can run code: "
            "have PEFT save it again with safe_serialization=True"
        )
    inside = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG_FILE}"))
    return f"; adapters are in its folders {', '.join(inside)}" if inside else ""


def read_config(values: Any, where: Path | str) -> LoRAConfig:
    """PEFT's settings as ours.

    Raises:
        AdapterFileError: begins with `where`; lists every setting that would change the function and is not supported.
    """
    if not isinstance(values, dict):
        raise AdapterFileError(f"{where}: expected an object, found {type(values).__name__}")
    problems = []
    if values.get("peft_type") != "LORA":
        problems.append(
            f"peft_type is {values.get('peft_type')!r}; this version reads LORA, PROMPT_TUNING, P_TUNING, PREFIX_TUNING"
        )
    init = values.get("init_lora_weights", True)
    if not isinstance(init, bool | str) or init not in _INIT_ON_PRISTINE_BASE:
        problems.append(
            f"init_lora_weights is {init!r}, which changed the base it was trained on; have PEFT convert it "
            "(save_pretrained with path_initial_model_for_weight_conversion) to a plain LoRA"
        )
    for key, value in values.items():
        if key not in _NEUTRAL | _READ and value not in _OFF:
            problems.append(f"{key} is {value!r}, which this version does not support")
    tokens = values.get("trainable_token_indices") or ()
    if isinstance(tokens, dict):
        if len(tokens) > 1:
            problems.append(f"trainable_token_indices names {len(tokens)} embeddings; this version reads one")
        tokens = next(iter(tokens.values()))
    if not problems:
        layers = values.get("layers_to_transform")
        try:
            return LoRAConfig(
                r=values.get("r", 8),
                alpha=values.get("lora_alpha", 8),
                dropout=values.get("lora_dropout", 0.0),
                target_modules=names_alone(values.get("target_modules") or ()),
                exclude_modules=values.get("exclude_modules") or None,
                rank_pattern=values.get("rank_pattern") or {},
                alpha_pattern=values.get("alpha_pattern") or {},
                layers=(layers,) if isinstance(layers, int) else tuple(layers) if layers else None,
                scaling="rslora" if values.get("use_rslora") else "lora",
                delta="dora" if values.get("use_dora") else "lora",
                init=_INIT_ON_PRISTINE_BASE[init],
                bias=values.get("bias", "none"),
                lora_bias=values.get("lora_bias") or False,
                modules_to_save=tuple(values.get("modules_to_save") or ()),
                target_parameters=values.get("target_parameters") or (),
                trainable_tokens=tuple(tokens),
                alora_invocation_tokens=tuple(values.get("alora_invocation_tokens") or ()),
            )
        except (ConfigError, TypeError) as error:
            problems.append(str(error))
    raise AdapterFileError(f"{where}: cannot be used:\n{bullet_list(problems)}")


def _read_beside(metadata: dict[str, str], where: Path) -> tuple[dict[str, tuple[Any, Any]], tuple[str, ...]]:
    """Undo `_beside`: setting -> (PEFT's value, ours), and the attentions of which the output is left alone."""
    if _BESIDE not in metadata:
        return {}, ()
    try:
        beside = parse_json(metadata[_BESIDE], f"{where} ({_BESIDE} metadata)")
        return {key: (theirs, ours) for key, (theirs, ours) in beside["config"].items()}, tuple(beside["attentions"])
    except (FileError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise AdapterFileError(f"{where}: its {_BESIDE} metadata is damaged: {error}") from None


def _sort_tensors(
    tensors: dict[str, torch.Tensor],
    config: LoRAConfig,
    where: Path,
    *,
    parameters: tuple[str, ...],
    attentions: tuple[str, ...],
) -> Adapter:
    """Give every tensor its place in the value, or say that it has none.

    Args:
        tensors: by their names in the file.
        config: as read.
        where: named in errors.
        parameters: `target_parameters` as PEFT knows them.
        attentions: those of which the input projection alone is in the file.
    """
    problems: list[str] = []
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    embeddings: set[str] = set()
    biases: dict[str, torch.Tensor] = {}
    replaced: dict[str, torch.Tensor] = {}
    tokens: dict[str, torch.Tensor] = {}
    saved = re.compile("|".join(rf"(?:.*\.)?{re.escape(name)}\..+" for name in config.modules_to_save) or r"(?!)")
    for key in sorted(tensors):
        name = key.removeprefix(_PREFIX)
        if name == key:
            problems.append(f"{key}: does not begin with {_PREFIX!r}")
        elif match := _LORA_KEY.fullmatch(name):
            letter = match["matrix"] or match["embedding"] or match["bias"] or match["magnitude"]
            pairs.setdefault(match["path"], {})[letter] = tensors[key]
            if match["embedding"]:
                embeddings.add(match["path"])
        elif saved.fullmatch(name):
            replaced[name] = tensors[key]
        elif name.endswith(_TOKENS) and config.trainable_tokens:
            tokens[name.removesuffix(_TOKENS)] = tensors[key]
        elif name.endswith("bias") and config.bias != "none":
            biases[peft_nested.path_of_bias(name)] = tensors[key]
        else:
            problems.append(f"{key}: unexpected; no low-rank factor, and not named by bias or modules_to_save")
    rows = {name: len(pair.get("A", ())) for name, pair in pairs.items()}
    places = peft_nested.paths(rows, config, parameters, attentions, problems)
    factors = {}
    for name, pair in pairs.items():
        needed = ["A", "B", *["B.bias"] * config.lora_bias, *["magnitude"] * (config.delta == "dora")]
        missing = [letter for letter in needed if letter not in pair]
        problems += [f"{name}: lora_{_IN_FILE.get(letter, letter)} is missing" for letter in missing]
        if "B.bias" in pair and not config.lora_bias:
            problems.append(f"{name}: lora_B.bias is unexpected; the config's lora_bias is off")
        elif "magnitude" in pair and config.delta != "dora":
            problems.append(f"{name}: lora_magnitude_vector is unexpected; the config's use_dora is off")
        elif not missing and name in places:
            path, kind = places[name]
            kind = "embedding" if name in embeddings else "convolution" if pair["A"].ndim > 2 else kind
            f = _factors(pair["A"], pair["B"], path, kind, config, problems)
            magnitude = pair.get("magnitude")
            factors[path] = replace(
                f, bias=pair.get("B.bias"), magnitude=None if magnitude is None else magnitude.flatten()
            )
    if problems:
        raise AdapterFileError(f"{where}: nothing loaded:\n{bullet_list(problems)}")
    return Adapter(config=config, factors=factors, biases=biases, replaced=replaced, tokens=tokens)


def _factors(
    A: torch.Tensor, B: torch.Tensor, path: str, kind: Kind, config: LoRAConfig, problems: list[str]
) -> Factors:
    """Factors as a value has them; where the rank is not the config's, `problems` says so."""
    known_as = peft_nested.attention_of(path, kind)
    expected = peft_nested.rank(config, known_as)
    alpha = by_pattern(config.alpha_pattern, known_as, config.alpha)
    if kind == "experts":
        pair = peft_nested.stacked(A, B, expected)
        if pair is None:
            problems.append(
                f"{path}: A {tuple(A.shape)} and B {tuple(B.shape)} are no stacks of rank {expected}, the config's"
            )
        return Factors(A=(pair or (A, B))[0], B=(pair or (A, B))[1], alpha=alpha, kind=kind)
    if kind == "convolution":
        A = _grouped(A, B)
    if A.shape[0] != expected:
        problems.append(f"{path}: rank {A.shape[0]} in the tensors, {expected} in the config, so its scale is unknown")
    return Factors(A=A, B=B, alpha=alpha, kind=kind)


def _grouped(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """Undo `_ungrouped` where A is zero outside its group; else A stays as it is (such an update works, but cannot be
    merged).
    """
    if B.ndim < 2 or B.shape[1] == 0 or A.shape[0] % B.shape[1]:
        return A  # malformed; Adapter.check says so
    groups = A.shape[0] // B.shape[1]
    if groups == 1 or A.shape[1] % groups:
        return A
    rows, width = A.shape[0] // groups, A.shape[1] // groups
    blocks = A.reshape(groups, rows, groups, width, *A.shape[2:])
    own = torch.stack([blocks[g, :, g] for g in range(groups)])
    if int(torch.count_nonzero(A)) != int(torch.count_nonzero(own)):
        return A
    return own.flatten(0, 1).contiguous()
