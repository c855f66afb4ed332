"""The chunked cross-entropy equals torch's; the mean loss does not depend on how rows are divided."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lorakit
from lorakit import LoRAConfig
from lorakit.training import objectives
from lorakit.training.objectives import cross_entropy_sum, cross_entropy_sum_reference, mean_loss


@pytest.mark.parametrize("rows", [0, 1, 7, 200])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_value_and_gradient(rows, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(objectives, "_CHUNK_ON_CPU", 50 * 33)  # several chunks, the last one short
    torch.manual_seed(0)
    values, targets = torch.randn(rows, 33).to(dtype) * 4, torch.randint(0, 33, (rows,))
    results = []
    for function in (cross_entropy_sum, cross_entropy_sum_reference):
        logits = values.clone().requires_grad_()
        loss = function(logits, targets)
        (loss / max(rows, 1)).backward()
        assert torch.equal(logits.detach(), values)  # the caller's logits are not workspace
        results.append((loss.detach(), logits.grad))
    (loss, gradient), (expected, expected_gradient) = results
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=tolerance, atol=tolerance / max(rows, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapted", [False, True])
def test_the_gradient_may_take_the_place_of_logits_that_nobody_reads(dtype, adapted):
    torch.manual_seed(0)
    head = torch.nn.Linear(5, 33, bias=False).to(dtype)
    if adapted:
        lorakit.attach(head_in := torch.nn.ModuleDict({"head": head}), LoRAConfig(r=2, target_modules=["head"]))
        assert head_in["head"] is head
    states, targets = torch.randn(1, 7, 5).to(dtype), torch.randint(0, 33, (7,))
    results = []
    for overwrite in (False, True):
        x = states.clone().requires_grad_()
        logits = head(x).squeeze(0)
        before = logits.detach().clone()
        loss = cross_entropy_sum(logits, targets, overwrite=overwrite)
        assert torch.equal(logits.detach(), before) != overwrite
        loss.backward()
        results.append((loss.detach(), x.grad))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_logits_that_are_needed_again_stay():
    x = torch.randn(7, 33, requires_grad=True)
    for logits in (torch.tanh(x @ torch.eye(33)), x * 1.0):
        before = logits.detach().clone()
        cross_entropy_sum(logits, torch.zeros(7, dtype=torch.long), overwrite=True).backward()
        assert torch.equal(logits.detach(), before)


def test_no_gradient_is_kept_when_none_is_wanted():
    assert not cross_entropy_sum(torch.randn(4, 9), torch.tensor([1, 2, 3, 4])).requires_grad


def test_the_gradient_is_there_once():
    loss = cross_entropy_sum(torch.randn(4, 9, requires_grad=True), torch.tensor([1, 2, 3, 4]))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.backward()


class Row:
    def __init__(self, ids, trained):
        self.ids, self.trained, self.origin = ids, trained, None


def test_mean_loss_is_per_token_over_all_rows_however_they_are_divided():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=97
    )
    model = LlamaForCausalLM(config)
    rows = [
        Row(torch.randint(0, 97, (n,)).tolist(), [False] + [i % 3 > 0 for i in range(n - 1)]) for n in (4, 9, 30, 17)
    ]
    expected, tokens = 0.0, 0
    model.eval()
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.tensor([row.ids])).logits[0]
            losses = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(row.ids[1:]), reduction="none")
            mask = torch.tensor(row.trained[1:])
            expected, tokens = expected + float(losses[mask].sum()), tokens + int(mask.sum())
    model.train()
    for limit in (1, 20, 1000):
        loss, counted = mean_loss(model, rows, micro_batch_tokens=limit)
        assert counted == tokens
        assert abs(loss - expected / tokens) < 1e-5
    assert model.training
    with pytest.raises(ValueError, match="no labelled token"):
        mean_loss(model, [Row([1, 2], [False, False])])
