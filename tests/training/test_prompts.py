"""Soft prompts in runs: alone and with LoRA, resumed to the bit, the same loss as PEFT's step by step, planned."""

import json
import math
import shutil

import peft
import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

import lorakit
from lorakit import Adapter, LoRAConfig, PromptConfig
from lorakit.data.batches import collate
from lorakit.data.chat import ChatFormat
from lorakit.data.prepare import prepare
from lorakit.errors import ConfigError
from lorakit.models import load_model, stop_ids
from lorakit.training.loop import Plan
from lorakit.training.objectives import mean_loss
from lorakit.training.optim import make_optimizer
from lorakit.training.plan_run import plan_run
from lorakit.training.run import train
from lorakit.training.trace import trace_evaluation, trace_step
from tiny_models import tiny_llama
from tiny_runs import StopAt, assert_same_run, configured, metrics
from training.test_planning import counted
from training.test_planning import rows as plan_rows

# PEFT's own call of a property that transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

PROMPTS = {
    "prompt": {"soft_prompt": "prompt", "virtual_tokens": 9},
    "text": {"soft_prompt": "prompt", "virtual_tokens": 9, "prompt_text": "colours: "},
    "p_tuning": {"soft_prompt": "p_tuning", "virtual_tokens": 9, "encoder_hidden": 8},
    "lstm": {"soft_prompt": "p_tuning", "virtual_tokens": 9, "prompt_encoder": "lstm", "encoder_hidden": 8},
    "prefix": {"soft_prompt": "prefix", "virtual_tokens": 9},
    "projected prefix": {"soft_prompt": "prefix", "virtual_tokens": 9, "prompt_encoder": "mlp", "encoder_hidden": 8},
}
ALONE = {"target_modules": "none"}


def run_of(settings, folder, prompt, lora=None, **changes):
    return configured(
        {**settings, "prompt": prompt, "lora": settings["lora"] if lora is None else lora}, folder, **changes
    )


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "with LoRA"])
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_a_resumed_run_is_the_uninterrupted_one(settings, tmp_path, prompt, alone):
    def config(folder, **changes):
        return run_of(settings, tmp_path / folder, prompt, ALONE if alone else None, **changes)

    whole = train(config("whole"))
    train(config("parts"), StopAt(5))
    train(config("parts", resume=True))
    for which in ("best", "last"):
        one, other = (Adapter.load(tmp_path / folder / which) for folder in ("whole", "parts"))
        assert one.digest() == other.digest()
        assert one.prompt.length == 9
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    samples = [json.loads((tmp_path / folder / "samples.json").read_text()) for folder in ("whole", "parts")]
    assert samples[0] == samples[1]
    if alone:
        assert_same_run(tmp_path / "whole", tmp_path / "parts")
    # where it began is the base, which a fresh prompt is not; where it came to is better than where the prompt began
    model, tokenizer = load_model(str(settings["model"]), "fp32", "cpu")
    valid = examples(config("x"), tokenizer, "validation")
    # its norms are not frozen yet, and so not fused
    assert whole.initial_loss == pytest.approx(mean_loss(model, valid, micro_batch_tokens=120)[0], rel=1e-6)
    handle = lorakit.attach(
        model,
        LoRAConfig(**(ALONE if alone else settings["lora"])),
        prompt=PromptConfig(**prompt),
        tokenizer=tokenizer,
        seed=0,
    )
    assert whole.best_loss < mean_loss(model, valid, micro_batch_tokens=120)[0]
    assert whole.trained_parameters == handle.summary()["trained_parameters"]
    assert (whole.adapted_layers, whole.virtual_tokens) == (0 if alone else 14, 9)
    handle.detach()
    lorakit.attach(model, tmp_path / "whole" / "best")
    assert mean_loss(model, valid, micro_batch_tokens=120)[0] == whole.best_loss
    sizes = [file.stat().st_size for file in (tmp_path / "whole" / "best").rglob("adapter_model.safetensors")]
    assert whole.adapter_bytes == sum(sizes)
    assert len(sizes) == (1 if alone else 2)


@pytest.mark.parametrize("init", ["eva", "pissa", "lora_ga"])
def test_other_beginnings_of_lora_go_with_a_prompt(settings, tmp_path, init):
    def config(folder, **changes):
        lora = {"r": 2, "init": init, "delta": "lora" if init == "lora_ga" else "dora"}
        return run_of(settings, tmp_path / folder, PROMPTS["prefix"], lora, **changes)

    train(config("whole"))
    train(config("parts"), StopAt(5))
    train(config("parts", resume=True))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    one, other = (Adapter.load(tmp_path / folder / "best") for folder in ("whole", "parts"))
    assert one.digest() == other.digest()


def examples(config, tokenizer, which):
    chat = ChatFormat(tokenizer, stop_ids(None, tokenizer), config.max_length, config.chat_template)
    return prepare(getattr(config, which), chat).examples


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_twelve_steps_equal_peft(settings, tmp_path, kind):
    """Packed micro-batches that share the virtual tokens, against padded rows; cosine, warm-up, clipping."""
    prompt = {"soft_prompt": kind, "virtual_tokens": 9}
    steps = {
        "max_steps": 12,
        "warmup": 0.1,
        "eval_steps": 12,
        "samples": 0,
        "learning_rate": 2e-2,
        "prompt_lr_ratio": 1.0,
    }
    config = run_of(settings, tmp_path / "run", prompt, ALONE, **steps)
    train(config)
    ours = [row["loss"] for row in metrics(tmp_path / "run") if "loss" in row]

    model, tokenizer = load_model(config.model, "fp32", "cpu")
    rows = examples(config, tokenizer, "data")
    began = lorakit.attach(model, PromptConfig(**prompt), seed=config.seed).extract().prompt.values
    lorakit.adapters(model).detach()
    theirs = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[kind]
    model = peft.get_peft_model(model, theirs(task_type="CAUSAL_LM", num_virtual_tokens=9))
    (trained,) = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        trained.copy_(began)
    optimizer = torch.optim.AdamW([trained], lr=2e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(0.1 * 12), 12)
    model.train()
    losses = []
    for _, step in zip(range(12), Plan.of(config, rows).steps(0), strict=False):
        batch = [rows[i] for indices in step for i in indices]
        longest = max(len(example.ids) for example in batch)
        ids, mask = (torch.zeros(len(batch), longest, dtype=torch.long) for _ in range(2))
        labels = torch.full_like(ids, -100)
        for i, row in enumerate(batch):
            ids[i, : len(row.ids)], mask[i, : len(row.ids)] = torch.tensor(row.ids), 1
            labels[i, : len(row.ids)] = torch.tensor(row.ids).where(torch.tensor(row.trained), torch.tensor(-100))
        logits = model(input_ids=ids, attention_mask=mask).logits[:, -longest:]
        targets = labels[:, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([trained], config.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert float((trained.detach() - began).abs().max()) > 0.1  # it moved
    assert ours == pytest.approx(losses, rel=5e-5)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_checkpointed_activations_change_nothing(settings, tmp_path, kind):
    for on in ("on", "off"):
        prompt = {"soft_prompt": kind, "virtual_tokens": 9}
        train(run_of(settings, tmp_path / on, prompt, {"r": 4}, gradient_checkpointing=on, max_steps=4, samples=0))
    losses = [[row.get("loss", row.get("eval_loss")) for row in metrics(tmp_path / on)] for on in ("on", "off")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_prompt_has_a_rate_of_its_own(settings, tmp_path):
    config = run_of(
        settings, tmp_path / "run", PROMPTS["p_tuning"], prompt_lr_ratio=4, loraplus_lr_ratio=2, max_steps=2
    )
    model, _ = load_model(config.model, "fp32", "cpu")
    ad = lorakit.attach(model, config.lora, prompt=config.prompt)
    assert all(".prompt." in name for name in ad.prompt_side())
    assert not ad.prompt_side() & ad.output_side()  # its encoder's biases are vectors, and no B's
    optimizer = make_optimizer(config, ad.trainable_tensors(), ad.output_side(), ad.prompt_side())
    rates = {id(p): group["ratio"] for group in optimizer.param_groups for p in group["params"]}
    for name, tensor in ad.trainable_tensors().items():
        assert rates[id(tensor)] == (4 if name in ad.prompt_side() else 2 if name in ad.output_side() else 1), name
    train(config)
    steps = [row for row in metrics(tmp_path / "run") if "loss" in row]
    assert all(row["lr_prompt"] == 4 * row["lr"] for row in steps)
    left_open = {kind: run_of(settings, tmp_path / "x", prompt).prompt_ratio for kind, prompt in PROMPTS.items()}
    assert left_open == {kind: 10.0 if kind in ("prompt", "text", "prefix") else 1.0 for kind in PROMPTS}
    assert configured(settings, tmp_path / "x").prompt_ratio == 1.0


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"lora": ALONE, "prompt": {}}, "target_modules: is none, and there is no soft prompt"),
        ({"prompt": {}, "prompt_lr_ratio": 2.0}, "prompt_lr_ratio: has no meaning without a soft prompt"),
        ({"prompt_lr_ratio": 0}, "prompt_lr_ratio: must be positive"),
        ({"cache_trunk": "memory"}, "cache_trunk: with a soft prompt"),
        ({"method": "full", "lora": {"r": 8}}, "soft_prompt: goes with method sft"),
        ({"lora": ALONE, "loraplus_lr_ratio": 16.0}, "a soft prompt alone has no B"),
        ({"lora": ALONE, "frozen_products": "int8"}, "frozen_products: is for adapted layers"),
    ],
)
def test_settings_at_odds_are_named(settings, tmp_path, changes, problem):
    with pytest.raises(ConfigError, match=problem):
        configured({**settings, "prompt": PROMPTS["prefix"], **changes}, tmp_path)


def test_rows_and_virtual_tokens_must_fit_the_context(settings, tmp_path):
    prompt = {"soft_prompt": "prompt", "virtual_tokens": 500}
    with pytest.raises(
        ConfigError, match="500 and the longest row, 52 tokens, are more than the model's context of 512"
    ):
        train(run_of(settings, tmp_path / "run", prompt))


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_a_plan_counts_a_prompt(settings, tmp_path, prompt):
    config = run_of(settings, tmp_path / "run", prompt, max_steps=2, samples=0)
    plan = plan_run(config, steps_timed=1)
    run = train(config)
    assert plan.trained == run.trained_parameters
    assert plan.tokens == pytest.approx(run.tokens, rel=0.05)  # of mean rows
    tensors = sum(tensor.numel() * 4 for tensor in Adapter.load(tmp_path / "run" / "best").tensors().values())
    assert plan.adapter_bytes == tensors
    assert plan.tokens_per_second > 0


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_a_trace_counts_what_a_step_allocates(kind):
    found = []
    for device in ("cpu", "meta"):
        model = tiny_llama(vocabulary=97)
        lorakit.attach(model, LoRAConfig(r=4), prompt=PromptConfig(soft_prompt=kind, virtual_tokens=9))
        first = tuple(range(97, 106)) if kind == "prompt" else ()
        batch = collate(plan_rows(60, 90, 40, 75), range(4), first=first)
        if device == "meta":
            traced = trace_step(model.to("meta"), batch, 100), trace_evaluation(model, batch, 100)
            found.append((traced[0].peak, traced[1].peak))
        else:
            model.train()
            step = counted(model, batch, 100, backward=True)
            model.eval()
            found.append((step[0], counted(model, batch, 100, backward=False)[0]))
    for real, said in zip(*found, strict=True):
        assert said == pytest.approx(real, rel=0.05)


def test_the_run_folder_holds_what_it_was(settings, tmp_path):
    config = run_of(settings, tmp_path / "run", PROMPTS["text"], max_steps=2)
    train(config)
    again = type(config).from_yaml(tmp_path / "run" / "run.yaml")
    assert again.prompt == config.prompt
    shutil.rmtree(tmp_path / "run" / "best")
    with pytest.raises(ConfigError, match="unknown"):
        type(config).from_dict({**settings, "soft_promt": "prefix"})
