"""LyCORIS layers as plain factors: the same update as LyCORIS' own modules compute, in every form they come in."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lorakit
from formats.diffusion import quiet, run_unet, unet
from lorakit import Adapter
from lorakit.errors import AdapterFileError
from lorakit.formats.lycoris import expand

lycoris_modules = pytest.importorskip("lycoris.modules")

LAYERS = {
    "linear": lambda: nn.Linear(64, 96),
    "convolution": lambda: nn.Conv2d(64, 48, 3, padding=1),
    "one pixel": lambda: nn.Conv2d(64, 48, 1),
    "line": lambda: nn.Conv1d(64, 48, 5, padding=2),
}
MODULES = {"locon": "locon.LoConModule", "loha": "loha.LohaModule", "lokr": "lokr.LokrModule"}
FORMS = {
    "plain": {},
    "core": {"use_tucker": True},
    "rslora": {"rs_lora": True},
    "both halves": {"decompose_both": True, "factor": 4},
    "whole halves": {"full_matrix": True},  # with rslora its file does not tell the scale: every reader takes 1
    "rank above the layer's": {"lora_dim": 20},
}
CASES = [
    (method, layer, form)
    for method in MODULES
    for layer in LAYERS
    for form in FORMS
    if (method == "lokr" or form not in ("both halves", "whole halves"))
    and not (method == "locon" and form == "rank above the layer's")
]


def module_of(method, layer, form):
    """A LyCORIS module on a layer, its tensors random, in evaluation mode."""
    import importlib

    file, name = MODULES[method].split(".")
    make = getattr(importlib.import_module(f"lycoris.modules.{file}"), name)
    torch.manual_seed(0)
    module = quiet(make, "layer", layer, **{"lora_dim": 3, "alpha": 2.0, **FORMS[form]})
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.4)
    return module.eval()


def tensors_of(module):
    return {name: tensor.detach().clone() for name, tensor in module.custom_state_dict().items()}


@pytest.mark.parametrize(("method", "layer", "form"), CASES)
def test_the_expansion_is_the_update_lycoris_computes(method, layer, form):
    base = LAYERS[layer]().requires_grad_(False)
    module = module_of(method, base, form)
    factors = expand(tensors_of(module), tuple(base.weight.shape))
    assert factors.r <= min(base.weight.shape[0], base.weight[0].numel())
    x = torch.randn({"linear": (5, 64), "line": (2, 64, 9)}.get(layer, (2, 64, 6, 6)))
    with torch.no_grad():
        expected = module(x) - base(x)
    changed = LAYERS[layer]()
    changed.weight.data = factors.delta("lora")
    changed.bias.data.zero_()
    torch.testing.assert_close(changed(x).detach(), expected, rtol=1e-4, atol=1e-4)
    if method != "locon":
        torch.testing.assert_close(
            factors.delta("lora"), module.get_weight(base.weight.shape).detach(), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(
    ("method", "rank"),
    [("locon", 3), ("loha", 3 * 3), ("lokr", 4 * 3)],  # LoKr: a whole half of 4 x 4, and one of rank 3
)
def test_the_rank_is_the_lowest_that_the_form_allows(method, rank):
    base = nn.Linear(64, 64)
    module = module_of(method, base, "both halves" if method == "lokr" else "plain")
    factors = expand(tensors_of(module), (64, 64))
    assert factors.r == rank
    assert int(torch.linalg.matrix_rank(factors.delta("lora"), rtol=1e-5)) == rank


def test_a_file_of_mixed_layers_is_what_lycoris_makes_of_the_model(tmp_path):
    from lycoris import LycorisNetwork, create_lycoris

    theirs = unet()
    LycorisNetwork.apply_preset({"target_module": ["Attention", "ResnetBlock2D"], "target_name": []})
    network = quiet(create_lycoris, theirs, 1.0, linear_dim=3, linear_alpha=2, algo="loha", conv_dim=2, use_tucker=True)
    network.apply_to()
    torch.manual_seed(2)
    for parameter in network.parameters():
        parameter.data.normal_(0, 0.3)
    expected = run_unet(theirs.eval())
    save_file({k: v.contiguous() for k, v in network.eval().state_dict().items()}, tmp_path / "loha.safetensors")
    ours = unet()
    handle = lorakit.attach(ours, tmp_path / "loha.safetensors")
    assert len(handle.extract().factors) == len(network.loras)
    torch.testing.assert_close(run_unet(ours), expected, rtol=1e-4, atol=1e-4)


def test_a_compressed_loha_goes_on_as_any_adapter(tmp_path):
    base = unet()
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = tensors_of(module_of("loha", base.get_submodule(layer), "plain"))
    name = "lora_unet_" + layer.replace(".", "_")
    save_file({f"{name}.{part}": t.contiguous() for part, t in tensors.items()}, tmp_path / "a.safetensors")
    value = Adapter.load(tmp_path / "a.safetensors", model=base)
    assert value.factors[layer].r == 9
    value.save(tmp_path / "b.safetensors", format="diffusers")
    again = Adapter.load(tmp_path / "b.safetensors", model=base)
    torch.testing.assert_close(again.delta(layer), value.delta(layer))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"hada_w1_a": (4, 2), "hada_w1_b": (2, 6), "hada_w2_a": (4, 2)}, "hada_w2_b is missing"),
        (
            {"hada_w1_a": (4, 2), "hada_w1_b": (3, 6), "hada_w2_a": (4, 2), "hada_w2_b": (2, 6)},
            "do not belong together",
        ),
        ({"hada_w1_a": (5, 2), "hada_w1_b": (2, 6), "hada_w2_a": (5, 2), "hada_w2_b": (2, 6)}, r"weight \(4, 6\)"),
        ({"hada_w1_a": (4, 2), "hada_w1_b": (2, 6), "lora_up.weight": (4, 2)}, "tensors of LoHa and LoRA"),
        ({"lokr_w1": (2, 2), "lokr_w2": (2, 2)}, r"make no weight \(4, 6\)"),
        ({"lokr_w1": (2, 2), "lokr_w2_a": (2, 1)}, "lokr_w2_b is missing"),
        ({"lokr_w1": (2, 2), "lokr_w2": (2, 3), "lokr_w2_a": (2, 1)}, "whole and in factors"),
        ({"lokr_w1": (2, 2)}, "lokr_w2 is missing"),
        ({"lora_up.weight": (4, 2), "lora_down.weight": (0, 6)}, "do not belong together"),
        ({"lora_up.weight": (4,), "lora_down.weight": (1, 6)}, "do not belong together"),
        ({"oft_blocks": (2, 2)}, "OFT"),
        ({"diff": (4, 6)}, "a whole difference"),
        ({"lora_up.weight": (4, 2), "lora_down.weight": (2, 6), "surprise": ()}, "surprise: no tensor of"),
        ({"alpha": ()}, "nothing but alpha"),
        ({"lora_up.weight": (4, 2), "lora_down.weight": (2, 6), "alpha": (2,)}, "its alpha is"),
    ],
)
def test_what_makes_no_update_says_why(parts, message):
    with pytest.raises(AdapterFileError, match=message):
        expand({name: torch.ones(shape) for name, shape in parts.items()}, (4, 6))
