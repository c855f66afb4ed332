"""From a base and its adapters to one plain model on disk, with proof: fold, write, load again, compare, certify."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lorakit import files, machine, models
from lorakit.adapter import folding
from lorakit.adapter.attach import AttachedAdapters, attach
from lorakit.adapter.folding import MINIMUM_SURVIVAL, FoldReport
from lorakit.adapter.value import Adapter, BaseInfo
from lorakit.checkpoints.folder import NotStreamableError
from lorakit.data.chat import ChatFormat
from lorakit.data.sources import Row, read_rows
from lorakit.errors import AdapterError, ConfigError, MergeError
from lorakit.evaluation import evaluate
from lorakit.gguf_cache import quiet
from lorakit.merging import proof, stream
from lorakit.merging.proof import Proof
from lorakit.merging.requantise import requantise
from lorakit.quantised_base import Storage
from lorakit.version import __version__

CERTIFICATE = "merge_certificate.json"
PROMPT = "prompt"
"""Folder, in that of a merged model, of a soft prompt, which is no part of weights and stays an adapter."""
LOST = 0.5
"""Share of an adapter's effect that may be lost in a requantised model whose limit somebody has chosen."""
_COMPANIONS = ("generation_config.json", "preprocessor_config.json", "processor_config.json", "*.py")
_HEADROOM = 1.3  # a loaded model takes more than its weights while it answers a few short rows


@dataclass(frozen=True, kw_only=True)
class Merge:
    """A merge that has been written.

    Attributes:
        output: folder that was written.
        model: what `load_model` takes: that folder, or the GGUF file in it.
        base: what it was merged into, as `load_model` takes it.
        held: how the base was held, as `models.storage_of` has it; its numbers are those of it.
        how: "streamed" tensor by tensor, "requantised", or "in memory" with the reason.
        report: how much of the update survived rounding, per parameter.
        proof: the comparison with base + adapter; None if it was not asked for.
        scores: metric -> (base + adapter, merged), on the data, if there were any.
        tokenizer: whether one was found and put beside the weights.
        prompt: the folder of the soft prompt that an adapter had; None: none had one.
        accepted: it did not pass and was written all the same, as asked.
        seconds: wall time.
    """

    output: Path
    model: Path
    base: str
    held: str
    how: str
    report: FoldReport
    proof: Proof | None
    scores: dict[str, tuple[float, float]]
    tokenizer: bool
    prompt: Path | None
    accepted: bool
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON, and the certificate."""
        return {
            "lorakit": __version__,
            "model": self.model.name if self.model != self.output else ".",
            "base": self.base,
            "base_held_in": self.held,
            "how": self.how,
            "dtypes": list(self.report.dtypes),
            "survived": self.report.survived,
            "untied": list(self.report.untied),
            "proof": None if self.proof is None else self.proof.to_dict(),
            "scores": {metric: {"adapter": a, "merged": m} for metric, (a, m) in self.scores.items()},
            "tokenizer": self.tokenizer,
            "prompt": None if self.prompt is None else str(self.prompt),
            "accepted_without_passing": self.accepted,
            "seconds": round(self.seconds, 2),
        }


def merge(
    *,
    adapters: Sequence[str | Path | Adapter],
    output: str | Path,
    model: str | None = None,
    weights: Sequence[float] | None = None,
    dtype: str = "auto",
    rounding: str = "nearest",
    seed: int = 0,
    minimum_survival: float = MINIMUM_SURVIVAL,
    verify: bool = True,
    max_kl: float | None = None,
    data: str | Path | Sequence[Row] | None = None,
    metrics: Sequence[str] = ("loss",),
    limit: int | None = None,
    max_new_tokens: int = 256,
    device: str = "auto",
    accept: bool = False,
    requantize: bool = False,
    on_stage: Callable[[str], None] | None = None,
) -> Merge:
    """Fold adapters into a base model on disk, verify the result, and put it in place with its tokenizer.

    The base's shards are read and written tensor by tensor (a base whose files transformers converts while it loads is
    merged in memory instead). Of a base that was held quantised (a GGUF file's blocks, int8, NF4) the numbers are
    taken that the adapter was trained on, and a dense model is written: exactly what was trained. Arithmetic is fp32,
    rounded once. Nothing stands at `output` before all checks are passed. A soft prompt that an adapter has is no part
    of weights: it stays an adapter, for the merged model, in `output/prompt`, and models are compared without it.

    Args:
        adapters: folders, files or values; several are added up.
        output: folder of the merged model; must not exist yet, or be empty.
        model: what `load_model` takes; None: the base that the adapters name.
        weights: one an adapter; None: 1 each.
        dtype: of storage: auto (as in the base's files; bf16 where the base is quantised), fp32, bf16, fp16.
        rounding: nearest, or stochastic, which keeps small updates in the mean.
        seed: determines the draws of stochastic rounding.
        minimum_survival: share of the update that must survive rounding.
        verify: load what was written and compare it with base + adapter on prompts (takes the memory of one model, and
            a tokenizer: the adapter's or the base's).
        max_kl: largest mean divergence, nats a token; None: `MAX_KL`. Less is asked for where the adapter itself does
            little (a tenth of its own divergence from the base; half of it where you requantize and name a limit); what
            the dtype alone does, ten times over, passes anyway.
        data: rows on which to compare instead of a few general prompts, and to measure both models.
        metrics: as in `evaluate`, for the data.
        limit: take only the first rows of the data.
        max_new_tokens: where generation ends at the latest, for metrics that judge answers.
        device: on which to verify.
        accept: write the model even where it does not pass; the certificate says so.
        requantize: of a GGUF base, write a GGUF file whose merged weights are in the base's own formats and which is
            the base's file otherwise, tokenizer and chat template included. Most of a small update is lost in few
            bits: stochastic rounding keeps its mean and adds noise. `Merge.report` has the share for each weight.
        on_stage: called with a word for each stage as it begins.

    Raises:
        MergeError: too little of the update survives, or the merged model differs too much; nothing is written. Also
            where verifying would not fit into memory.
        NoTokenizerError: neither the base nor the adapter has a tokenizer, and the merge is to be verified.
        AdapterError, AdapterMismatchError, AdapterFileError, ModelError, ConfigError: as in `attach` and `load_model`.
    """
    start = time.perf_counter()
    output = Path(output)
    if not files.is_vacant(output):
        raise ConfigError(f"output: {output} exists; choose another folder, or remove it first")
    if rounding not in ("nearest", "stochastic"):
        raise ConfigError(f"rounding: nearest or stochastic (got {rounding!r})")
    if not adapters:
        raise ConfigError("adapters: name at least one")
    factors = [1.0] * len(adapters) if weights is None else list(weights)
    if len(factors) != len(adapters):
        raise ConfigError(f"weights: {len(factors)} for {len(adapters)} adapters; give one each")
    if not any(factors) or not all(math.isfinite(factor) for factor in factors):
        raise ConfigError(f"weights: finite numbers, not all of them 0 (got {factors})")
    if max_kl is not None and max_kl < 0:
        raise ConfigError(f"max_kl: nats a token, at least 0 (got {max_kl})")
    stage = on_stage or (lambda _: None)
    paths = [adapter for adapter in adapters if not isinstance(adapter, Adapter)]
    spec = model if model is not None else models.common_base(paths)
    values = [a if isinstance(a, Adapter) else models.read_adapter(a, spec) for a in adapters]
    held = models.storage_of(spec, models.agreed_storage(values, spec))
    values, factors, prompt = _apart(values, factors)
    if requantize:
        held = _in_blocks(spec, held, dtype)
    what = _What(spec, values, factors, held)
    share = LOST if requantize and max_kl is not None else proof.LOST
    most = proof.Limit(proof.MAX_KL if max_kl is None else max_kl, share)
    check = _Check(None if data is None else _rows(data, limit), metrics, max_new_tokens, most, device)

    stage("reading the base")
    skeleton = models.load_skeleton(spec)
    handle = what.attached_to(skeleton)
    draws = seed if rounding == "stochastic" else None
    if dtype == "auto" and held != "none" and not requantize:
        dtype = "bf16"
    storage = None if dtype == "auto" else machine.resolve_dtype(dtype, machine.resolve_device("cpu"))
    try:
        checkpoint = models.checkpoint_of(spec, skeleton, held)
        named = {f"adapter {i}": value.base for i, value in enumerate(values, 1)}
        stream.check_base(named, stream.base_info(checkpoint, skeleton))
    except NotStreamableError as error:
        checkpoint, reason = None, str(error)
    tokenizer = _tokenizer(spec, paths, skeleton, needed=verify)
    if requantize and tokenizer is not None and not accept:
        _require_own_template(spec, tokenizer)

    with files.atomic_folder(output) as building:
        stage("folding")
        written, place = building, output  # what is verified here, and where it will be
        if requantize:
            how = "requantised"
            blocks = models.gguf_weights(spec, skeleton)
            written = building / f"{blocks.file.path.stem}-merged.gguf"
            place = output / written.name
            report = requantise(blocks, handle, written, draws)
        elif checkpoint is not None:
            how = "streamed"
            report = stream.Stream(checkpoint, handle, storage, draws).run(building)
            _write_companions(checkpoint.folder, building, report, storage)
        else:
            how = f"in memory: {reason}"
            report = _merge_in_memory(what, dtype, draws, building)
        survived = report.survived >= minimum_survival
        if not survived and not accept:
            try:
                report.check(minimum_survival)
            except AdapterError as error:
                raise MergeError(f"{error} (accept=True writes it all the same)") from None
        if tokenizer is not None and not requantize:
            tokenizer.save_pretrained(building)
        if prompt is not None:
            merged = BaseInfo(name=str(place.resolve()), architecture="", dtype="", structure="", samples=())
            replace(prompt, base=merged).save(building / PROMPT)
        found: Proof | None = None
        scores: dict[str, tuple[float, float]] = {}
        if verify:
            stage("verifying")
            found, scores = _verify(what, tokenizer, written, "auto" if requantize else report.dtypes[0], check)
            if not found.passed and not accept:
                raise MergeError(_why(found, output, requantize=requantize))
        result = Merge(
            output=output,
            model=place,
            base=spec,
            held=held,
            how=how,
            report=report,
            proof=found,
            scores=scores,
            tokenizer=tokenizer is not None,
            prompt=None if prompt is None else output / PROMPT,
            accepted=not survived or (found is not None and not found.passed),
            seconds=time.perf_counter() - start,
        )
        certificate = result.to_dict() | {
            "adapters": [{"digest": v.digest(), "weight": f} for v, f in zip(values, factors, strict=True)],
            "rounding": rounding,
            "layers": [
                {
                    key: None if isinstance(value, float) and not math.isfinite(value) else value
                    for key, value in row.items()
                }
                for row in map(asdict, report.layers)  # the share of an update of zero, the ratio to a bias of zero
            ],
        }
        files.write_json(building / CERTIFICATE, certificate)
    return result


def _apart(values: Sequence[Adapter], weights: Sequence[float]) -> tuple[list[Adapter], list[float], Adapter | None]:
    """Adapters taken apart: what can be folded into weights, with its weights, and the one soft prompt there may be.

    Raises:
        AdapterError: two soft prompts, one with another weight than 1, or nothing that can be folded.
    """
    having = [(value, weight) for value, weight in zip(values, weights, strict=True) if value.prompt is not None]
    if len(having) > 1:
        raise AdapterError("merge: two adapters have a soft prompt, and rows can begin with one; merge them one by one")
    if having and having[0][1] != 1.0:
        raise AdapterError(f"merge: an adapter with a soft prompt has no weight but 1 (got {having[0][1]})")
    folded = [
        (value if value.prompt is None else value.without_prompt(), weight)
        for value, weight in zip(values, weights, strict=True)
        if value.config.target_modules != "none"
    ]
    if not folded:
        raise AdapterError(
            f"merge: the adapter is a soft prompt alone ({having[0][0].prompt}), which is no part of weights: use it "
            "as it is, with --adapter"
        )
    prompt = having[0][0].prompt_alone() if having else None
    return [value for value, _ in folded], [weight for _, weight in folded], prompt


@dataclass(frozen=True)
class _What:
    """What is merged: adapters, with a weight each, into a base as `load_model` takes it."""

    base: str
    adapters: Sequence[Adapter]
    weights: Sequence[float]
    storage: str
    """How the base is held when it is loaded."""

    def attached_to(self, model: Any) -> AttachedAdapters:
        """`model` with all of them, active."""
        handle = attach(model, self.adapters[0], name="0")
        for i, adapter in enumerate(self.adapters[1:], 1):
            handle.load(adapter, name=str(i))
        handle.activate({str(i): weight for i, weight in enumerate(self.weights)})
        return handle


@dataclass(frozen=True)
class _Check:
    """How a merged model is held against base + adapter; the fields are as `merge`'s arguments."""

    rows: Sequence[Row] | None
    metrics: Sequence[str]
    max_new_tokens: int
    limit: proof.Limit
    device: str

    def scores(self, model: Any, tokenizer: Any) -> dict[str, float]:
        """metric -> what the model reaches on the rows; nothing without rows."""
        if self.rows is None:
            return {}
        (result,) = evaluate(
            data=self.rows,
            model=(model, tokenizer),
            as_is=True,
            metrics=self.metrics,
            max_new_tokens=self.max_new_tokens,
        )
        return result.scores


def _in_blocks(spec: str, held: Storage, dtype: str) -> Storage:
    """How a base must be held to be written back in its own formats.

    Raises:
        ConfigError: it cannot be, or a dtype is asked for.
    """
    if held not in ("blocks", "none"):
        raise ConfigError(
            f"requantize: the adapter was made on a base held in {held}, for which there is no file of a model; merge "
            "into a dense model (without requantize), or keep the adapter unmerged"
        )
    if models.resolve(spec).kind != "gguf":
        raise ConfigError(f"requantize: {spec} is no GGUF file, so it has no formats to write in; merge without it")
    if dtype != "auto":
        raise ConfigError(f"requantize writes in the base's own formats, so it takes no dtype (got {dtype!r})")
    return models.storage_of(spec, "blocks")


def _require_own_template(spec: str, tokenizer: Any) -> None:
    """Refuse a tokenizer that the base's file does not have: the new file would have the base's.

    Raises:
        MergeError: the adapter brings another one.
    """
    base = models.load_tokenizer(spec)
    if tokenizer.chat_template != base.chat_template or tokenizer.get_vocab() != base.get_vocab():
        raise MergeError(
            f"the adapter was trained with another chat template or vocabulary than {spec} holds, and a requantised "
            "file keeps the base's: it would be asked in another way than it was trained. Merge into a dense model, "
            "whose folder has the adapter's tokenizer, or accept it as it is (accept=True, --accept)"
        )


def _rows(data: str | Path | Sequence[Row], limit: int | None) -> list[Row]:
    rows = read_rows(data, "test") if isinstance(data, str | Path) else list(data)
    return rows[:limit]


def _tokenizer(spec: str, paths: Sequence[str | Path], skeleton: Any, *, needed: bool) -> Any:
    """The only adapter's own tokenizer, else the base's; None where there is none and it is not needed."""
    lacking: models.NoTokenizerError | None = None
    try:
        tokenizer = models.load_tokenizer(spec)
    except models.NoTokenizerError as error:
        tokenizer, lacking = None, error
    if len(paths) == 1:
        tokenizer = models.tokenizer_beside(paths[0], skeleton, tokenizer)
    if tokenizer is None and needed:
        raise models.NoTokenizerError(
            f"{lacking}, and verifying needs one: it compares answers to prompts. Put the model's tokenizer files into "
            "its folder, or merge without verifying (verify=False, --no-verify)"
        )
    return tokenizer


def _merge_in_memory(what: _What, dtype: str, draws: int | None, target: Path) -> FoldReport:
    if what.storage != "none":
        raise MergeError(
            f"{what.base}: held in {what.storage} it can be merged only tensor by tensor, and its files cannot be read "
            "so; keep the adapter unmerged"
        )
    loaded = models.load_weights(what.base, "fp32" if dtype == "auto" else dtype, "cpu", what.storage)
    handle = what.attached_to(loaded)
    report = handle.merge_report(seed=draws)  # whoever called judges it; `handle.merge` would compute it once more
    folding.fold_in(loaded, handle.adapted_modules(), handle.active_selection(), draws)
    handle.detach()
    with quiet(progress_bars=False):
        loaded.save_pretrained(target)
    return report


def _write_companions(source: Path, target: Path, report: FoldReport, storage: Any) -> None:
    """The base's config, told of the new dtype and of what is tied no more, and its other small files."""
    config = files.read_json(source / "config.json")
    for part in (config, config.get("text_config") or {}):
        if report.untied and part.get("tie_word_embeddings", part is config):
            part["tie_word_embeddings"] = False
        if storage is not None:
            part.pop("torch_dtype", None)
            part["dtype"] = str(storage).removeprefix("torch.")
    files.write_json(target / "config.json", config)
    for pattern in _COMPANIONS:
        for file in sorted(source.glob(pattern)):
            shutil.copyfile(file, target / file.name)


def _verify(
    what: _What, tokenizer: Any, written: Path, dtype: str, check: _Check
) -> tuple[Proof, dict[str, tuple[float, float]]]:
    """Compare base + adapter with the folder or GGUF file that was written, one after the other in memory, both in
    `dtype`.
    """
    shards = [written] if written.is_file() else written.glob("*.safetensors")
    needed = int(_HEADROOM * sum(file.stat().st_size for file in shards))
    available = machine.available_memory()
    if machine.resolve_device(check.device).type == "cpu" and available is not None and needed > available:
        raise MergeError(
            f"verifying loads the model, about {needed / 1e9:.1f} GB, and {available / 1e9:.1f} GB are free. Free some,"
            " or merge without verifying (verify=False, --no-verify) and run lorakit eval on a larger machine"
        )
    adapted = models.load_weights(what.base, dtype, check.device, what.storage)
    handle = what.attached_to(adapted)
    stop = models.stop_ids(adapted, tokenizer)
    chat_format = ChatFormat(tokenizer, stop, max_length=512)
    if check.rows is None:
        prompts = [chat_format.prompt_ids(text) for text in proof.PROMPTS]
        texts = proof.answered(adapted, tokenizer, prompts, stop)
    else:
        chat_format = chat_format.for_rows(check.rows)
        texts = [example.ids for row in check.rows[:64] for example in chat_format.encode(row)]
    reference = proof.refer(adapted, handle, proof.within_budget(texts))
    with_adapter = check.scores(adapted, tokenizer)
    del adapted, handle
    merged, _ = models.load_model(written, dtype, check.device)
    found = proof.compare(reference, merged, check.limit)
    of_merged = check.scores(merged, tokenizer)
    return found, {metric: (with_adapter[metric], of_merged[metric]) for metric in of_merged}


def _why(found: Proof, output: Path, *, requantize: bool) -> str:
    m, f = found.merged, found.floor
    ways = (
        "Merge into a dense model (without requantize), round stochastically"
        if requantize
        else "Merge in a wider dtype (fp32)"
    )
    return (
        f"the merged model differs from the adapter: mean KL {m.mean_kl:.1e} nats a token where {found.limit:.1e} is "
        f"allowed (the dtype alone: {f.mean_kl:.1e}), the same top token in {m.same_top:.1%} of {found.positions} "
        f"({found.dtype}). Nothing was written to {output}. {ways}, keep the adapter unmerged, "
        "raise max_kl, or accept it as it is"
    )
