"""What `generate` and `chat` share, and `eval` in part: a model with or without an adapter, and its flags."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from lorakit.cli.common import Memory, console

if TYPE_CHECKING:
    from lorakit.data.chat import ChatFormat


class Subject(NamedTuple):
    """A loaded model, adapter active, with the chat format it expects."""

    model: Any
    chat_format: ChatFormat
    name: str
    """The base model as the user or the adapter names it."""


def load_subject(
    model: str | None, adapter: str | None, chat_template: str, dtype: str, device: str, quantize: str = "auto"
) -> Subject:
    """Load a model and give it an adapter; without a model, the base that the adapter names."""
    from lorakit import models
    from lorakit.adapter.attach import attach
    from lorakit.data.chat import ChatFormat

    spec = model if model is not None else models.common_base([adapter] if adapter else [])
    value = (
        models.read_adapter(adapter, spec) if adapter else None
    )  # before the model: what is wrong with it is told at once
    console.print(f"model  {spec}" + (f" with {adapter}" if adapter else ""))
    storage = models.agreed_storage([] if value is None else [value], spec, quantize)
    loaded, tokenizer = models.load_model(spec, dtype, device, storage)
    if adapter is not None and value is not None:
        attach(loaded, value)
        tokenizer = models.tokenizer_beside(adapter, loaded, tokenizer)
    # no row is encoded for training here, so max_length does not matter
    chat_format = ChatFormat(
        tokenizer, models.stop_ids(loaded, tokenizer), max_length=1024, chat_template=chat_template
    )
    return Subject(loaded, chat_format, spec)


unpack_option = click.option(
    "--unpack-memory",
    type=Memory(none=True),
    help="For weights of a quantised base unpacked while answers are written, e.g. 2GB; 0: none.  "
    "[default: half of what is free]",
)


def model_options(function: Callable[..., None]) -> Callable[..., None]:
    """`--model`, `--dtype`, `--quantize`, `--device`, `--chat-template`."""
    for option in (
        click.option(
            "--chat-template", default="auto", show_default=True, help="auto, none, a shipped name or a file."
        ),
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps."),
        click.option(
            "--quantize",
            type=click.Choice(["auto", "none", "blocks", "int8", "nf4"]),
            default="auto",
            show_default=True,
            help="How the base is held (as for train); auto: as it was for the adapter, else blocks of a .gguf file.",
        ),
        click.option("--dtype", "--torch_dtype", default="auto", show_default=True, help="auto, fp32, bf16, fp16."),
        click.option(
            "--model",
            "--model_name_or_path",
            help="Hub id, folder, .gguf file or smollm2; without it, the adapter's base.",
        ),
    ):
        function = option(function)
    return function


def subject_options(function: Callable[..., None]) -> Callable[..., None]:
    """What is asked, and how it answers: `model_options`, `--adapter`, `--unpack-memory`, and the flags of sampling."""
    for option in (
        click.option("--seed", type=int, default=0, show_default=True, help="Determines the draws."),
        click.option(
            "--top-p", type=float, default=1.0, show_default=True, help="Draw from the likeliest tokens only."
        ),
        click.option("--temperature", type=float, default=0.0, show_default=True, help="0: the likeliest token."),
        click.option("--max-new-tokens", type=int, default=256, show_default=True, help="Longest answer."),
        click.option("--adapter", metavar="FOLDER", help="Adapter to answer with."),
    ):
        function = option(function)
    return model_options(unpack_option(function))
