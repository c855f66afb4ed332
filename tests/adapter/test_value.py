"""The value on its own: scales, folding."""

import pytest
import torch

import lorakit
from adapter.models import CASES, randomise
from lorakit import LoRAConfig
from lorakit.errors import AdapterError


@pytest.mark.parametrize("uniform", [False, True])
def test_folded_scales_change_no_update_and_can_be_attached(uniform, tmp_path):
    case = CASES["llama"]
    model = case.build()
    config = LoRAConfig(r=4, alpha=3.0, scaling="rslora", rank_pattern={"q_proj": 6}, alpha_pattern={"down_proj": 9.0})
    handle = lorakit.attach(model, config)
    randomise(handle)
    expected, adapter = case.run(model), handle.extract()
    folded = adapter.folded(uniform_rank=uniform)
    assert all(folded.scale(path) == 1 for path in folded.factors)
    assert {f.r for f in folded.factors.values()} == ({6} if uniform else {4, 6})
    for path in adapter.factors:
        assert torch.allclose(folded.delta(path), adapter.delta(path), atol=1e-6)
    folded.save(tmp_path)
    handle.add("folded", tmp_path)
    handle.activate("folded")
    assert torch.allclose(case.run(model), expected, atol=1e-5)


def test_a_grouped_convolution_cannot_be_padded():
    case = CASES["convolutions"]
    handle = lorakit.attach(case.build(), LoRAConfig(r=2, target_modules=case.targets, rank_pattern={"one": 4}))
    with pytest.raises(AdapterError, match="two: a grouped convolution's rank cannot be padded from 2 to 4"):
        handle.extract().folded(uniform_rank=True)
