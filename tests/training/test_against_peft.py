"""Our loop against a plain transformers + PEFT loop: same rows, seeds and settings, the same losses step by step."""

import math

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from transformers import get_cosine_schedule_with_warmup

from lorakit.adapter.attach import attach
from lorakit.data.batches import plan_steps
from lorakit.data.chat import ChatFormat
from lorakit.data.prepare import prepare
from lorakit.models import load_model, stop_ids
from lorakit.training.run import train
from tiny_runs import configured, metrics, rows, write_rows

# PEFT's own call of a property that transformers has renamed
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),  # of layers without a bias of their own
]

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def peft_losses(config):
    """The losses of a loop written by hand: padded batches, autograd, torch's AdamW, transformers' schedule."""
    model, tokenizer = load_model(config.model, "fp32", "cpu")
    chat = ChatFormat(tokenizer, stop_ids(None, tokenizer), config.max_length, config.chat_template)
    examples = prepare(config.data, chat).examples
    start = attach(model, config.lora, seed=config.seed)
    initial = {name: tensor.detach().clone() for name, tensor in start.trainable_tensors().items()}
    model = start.detach()
    peft_config = PeftConfig(
        r=config.lora.r,
        lora_alpha=config.lora.alpha,
        lora_dropout=0.0,
        lora_bias=config.lora.lora_bias,
        target_modules=list(TARGETS),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, peft_config)
    names = {"A": "lora_A.default.weight", "B.bias": "lora_B.default.bias", "B": "lora_B.default.weight"}
    with torch.no_grad():
        for name, tensor in initial.items():
            path, ours = next((name.removesuffix(f".{own}"), own) for own in names if name.endswith(f".{own}"))
            model.get_parameter(f"base_model.model.{path}.{names[ours]}").copy_(tensor)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == len(initial)
    optimizer = torch.optim.AdamW(
        trained, lr=config.learning_rate, betas=(0.9, 0.99), eps=1e-8, weight_decay=config.weight_decay
    )
    warmup = math.ceil(config.warmup * config.max_steps)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, config.max_steps)
    model.train()
    losses = []
    for number in range(config.max_steps):
        micro_batches = step_of(config, examples, number)
        batch = [examples[i] for indices in micro_batches for i in indices]
        longest = max(len(example.ids) for example in batch)
        ids = torch.tensor([example.ids + [0] * (longest - len(example.ids)) for example in batch])
        mask = torch.tensor([[1] * len(example.ids) + [0] * (longest - len(example.ids)) for example in batch])
        labels = torch.full_like(ids, -100)
        for row, example in enumerate(batch):
            for place, (token, is_trained) in enumerate(zip(example.ids, example.trained, strict=True)):
                if is_trained:
                    labels[row, place] = token
        logits = model(input_ids=ids, attention_mask=mask).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def step_of(config, examples, number):
    batch_size = config.batch_size * config.gradient_accumulation_steps
    epoch, index = divmod(number, math.ceil(len(examples) / batch_size))
    lengths = [len(example.ids) for example in examples]
    plan = plan_steps(lengths, seed=config.seed, epoch=epoch, batch_size=batch_size, micro_batch_tokens=10**9)
    return plan[index]


def our_losses(config, folder):
    train(config)
    return [row["loss"] for row in metrics(folder) if "loss" in row]


@pytest.mark.parametrize(("accumulation", "lora_bias"), [(1, False), (3, False), (3, True)])
def test_twenty_steps_equal_peft(settings, tmp_path, accumulation, lora_bias):
    """Micro-batches of a few rows here, whole padded batches there; warm-up, cosine, clipping, weight decay."""
    config = configured(
        {**settings, "lora": {"r": 4, "alpha": 8.0, "dropout": 0.0, "lora_bias": lora_bias}},
        tmp_path / "run",
        max_steps=20,
        warmup=0.1,
        weight_decay=0.01,
        batch_size=6 // accumulation,
        gradient_accumulation_steps=accumulation,
        eval_steps=20,
        samples=0,
    )
    ours, theirs = our_losses(config, tmp_path / "run"), peft_losses(config)
    assert len(ours) == len(theirs) == 20
    assert theirs[-1] < theirs[0] - 0.5
    assert ours == pytest.approx(theirs, rel=2e-5)


@pytest.mark.real_model
def test_real_model_equals_peft_for_twenty_steps(smollm2, settings, tmp_path):
    """SmolLM2-135M in fp32; few short rows, so that it is quick."""
    data = write_rows(tmp_path / "train.jsonl", rows(6))
    valid = write_rows(tmp_path / "valid.jsonl", rows(2, start=1000))
    config = configured(
        {
            **settings,
            "model": smollm2,
            "data": str(data),
            "validation": str(valid),
            "lora": {"r": 8, "alpha": 16.0, "dropout": 0.0},
        },
        tmp_path / "run",
        max_steps=20,
        batch_size=2,
        learning_rate=1e-3,
        eval_steps=20,
        save_steps=20,
        samples=0,
    )
    ours, theirs = our_losses(config, tmp_path / "run"), peft_losses(config)
    assert len(ours) == len(theirs) == 20
    assert theirs[-1] < theirs[0] / 2
    assert ours == pytest.approx(theirs, rel=1e-3)
