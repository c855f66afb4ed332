"""`lorakit merge`: fold adapters into their base, verify the result, write a plain model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from lorakit.cli.common import console, emit, numbers, verb
from lorakit.errors import ConfigError

if TYPE_CHECKING:
    from lorakit.merging import Merge


@verb("merge")
@click.option("--adapter", "adapters", multiple=True, required=True, metavar="FOLDER", help="May be given again.")
@click.option("--output", required=True, metavar="FOLDER", help="Where the merged model goes; must not exist yet.")
@click.option("--model", "--model_name_or_path", help="Hub id, folder, .gguf file or smollm2; else the adapters' base.")
@click.option("--weights", multiple=True, metavar="W,W,...", help="One for each adapter; without it 1 each.")
@click.option(
    "--dtype", "--torch_dtype", default="auto", show_default=True, help="Of the merged weights: auto, fp32, bf16, fp16."
)
@click.option(
    "--rounding",
    type=click.Choice(["nearest", "stochastic"]),
    default="nearest",
    show_default=True,
    help="stochastic keeps updates smaller than the dtype's steps, in the mean.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Determines the draws of stochastic rounding.")
@click.option("--minimum-survival", type=float, help="Share of the update that must survive rounding.  [default: 0.8]")
@click.option("--max-kl", type=float, help="Largest mean divergence from the adapter, nats a token.  [default: 0.01]")
@click.option("--data", metavar="FILE", help="Compare on these rows, and measure both models on them.")
@click.option("--metric", "metrics", multiple=True, help="For --data, as in eval.  [default: loss]")
@click.option("--limit", type=int, help="Use only the first rows of --data.")
@click.option("--max-new-tokens", type=int, default=256, show_default=True, help="Longest answer.")
@click.option("--device", default="auto", show_default=True, help="On which to verify: auto, cpu, cuda, mps.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Load what was written and compare it.")
@click.option(
    "--requantize",
    is_flag=True,
    help="Of a GGUF base, write a GGUF file in the base's own formats; most of a small update is lost in few bits.",
)
@click.option("--accept", is_flag=True, help="Write the model even where it does not pass; the certificate says so.")
def command(
    adapters: Sequence[str], output: str, weights: Sequence[str], metrics: Sequence[str], as_json: bool, **settings: Any
) -> None:
    """Fold adapters into their base model and write a plain one, with its tokenizer and a certificate.

    The base is read and written tensor by tensor, so the largest shard is all that has to fit into memory; verifying
    loads one model. What is there at --output afterwards has passed: the update survived rounding, and the outputs are
    the adapter's.
    """
    from lorakit.merging import merge

    if metrics and settings["data"] is None:
        raise ConfigError("--metric needs --data")
    names = [name.strip() for value in metrics for name in value.split(",")]
    optional = {key: settings.pop(key) for key in ("minimum_survival", "max_kl")}
    settings |= {key: value for key, value in optional.items() if value is not None}
    with console.status("merging") as status:
        result = merge(
            adapters=adapters,
            output=output,
            weights=numbers("--weights", weights) if weights else None,
            metrics=names or ("loss",),
            on_stage=lambda stage: status.update(stage),
            **settings,
        )
    for line in result_lines(result):
        console.print(line)
    emit({"output": output, **result.to_dict()}, as_json)


def result_lines(result: Merge) -> Iterator[str]:
    """What was done, what survived, how the merged model compares, and what to type next."""
    from lorakit.merging import CERTIFICATE

    report, proof = result.report, result.proof
    yield f"base   {result.base}, {result.how}"
    yield (
        f"merged {len(report.layers):,} weights in {', '.join(report.dtypes)}; "
        f"{report.survived:.2%} of the update survives rounding"
    )
    if result.how == "requantised":
        worst = sorted((layer for layer in report.layers if layer.energy), key=lambda layer: layer.survived)[:3]
        listed = ", ".join(f"{layer.name} ({layer.survived:.0%})" for layer in worst)
        yield f"       least of {listed}; of each weight: {CERTIFICATE}"
    if report.untied:
        yield f"       untied: {', '.join(report.untied)}"
    if not result.tokenizer:
        yield "       no tokenizer: the base has none; put its files beside the model to use it"
    if result.prompt is not None:
        yield f"prompt the soft prompt is no part of weights and stays an adapter: {result.prompt}"
    if proof is None:
        yield "proof  none (--no-verify)"
    else:
        m = proof.merged
        yield (
            f"proof  {'passed' if proof.passed else 'NOT passed, written as asked'}: KL {m.mean_kl:.1e} nats a token "
            f"(the dtype alone {proof.floor.mean_kl:.1e}, without adapter {proof.base.mean_kl:.1e}), same top token in "
            f"{m.same_top:.1%} of {proof.positions}, logits differ by {m.max_logit:.1e} at most"
        )
    for metric, (adapter, merged) in result.scores.items():
        yield f"       {metric} {adapter:.4f} with the adapter, {merged:.4f} merged"
    yield f"done   {result.output} in {result.seconds:.0f} s; certificate {CERTIFICATE}"
    using = f"--model {result.model}" + (f" --adapter {result.prompt}" if result.prompt is not None else "")
    yield f"next   lorakit chat {using}    lorakit eval DATA {using}"
