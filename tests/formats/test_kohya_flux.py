"""Flux in kohya's files, both ways, against diffusers; and what a bad file says."""

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders import FluxLoraLoaderMixin
from safetensors.torch import load_file, save_file
from torch import nn

import lorakit
from formats.diffusion import flux, quiet, run_flux, text_encoder, trained
from lorakit import Adapter, LoRAConfig
from lorakit.errors import AdapterFileError

D = 3072
# the release's layers with one block of each kind: (out, in)
RELEASED = {
    **{
        f"double_blocks_0_{stream}_{layer}": shape
        for stream in ("img", "txt")
        for layer, shape in {
            "attn_qkv": (3 * D, D),
            "attn_proj": (D, D),
            "mlp_0": (4 * D, D),
            "mlp_2": (D, 4 * D),
            "mod_lin": (6 * D, D),
        }.items()
    },
    "single_blocks_0_linear1": (7 * D, D),
    "single_blocks_0_linear2": (D, 5 * D),
    "single_blocks_0_modulation_lin": (3 * D, D),
    "img_in": (D, 64),
    "txt_in": (D, 4096),
    "time_in_in_layer": (D, 256),
    "time_in_out_layer": (D, D),
    "vector_in_in_layer": (D, 768),
    "vector_in_out_layer": (D, D),
    "guidance_in_in_layer": (D, 256),
    "guidance_in_out_layer": (D, D),
    "final_layer_linear": (64, D),
    "final_layer_adaLN_modulation_1": (2 * D, D),
}
LAYERS = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "proj_mlp"),
    *("net.0.proj", "net.2", "norm.linear", "norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out"),
    *("x_embedder", "context_embedder", "linear_1", "linear_2"),
)
UNEVEN = {"rank_pattern": {"to_q": 2, "add_v_proj": 3}, "alpha_pattern": {"to_q": 5.0, "proj_out": 1.0}}


@pytest.fixture(scope="module")
def published():
    """Flux in its own sizes, the only ones that diffusers' conversion knows, without weights."""
    with torch.device("meta"):
        return FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)


def drawn(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def file_of(path, r=4, alpha=2.0, names=RELEASED):
    tensors = {}
    for i, name in enumerate(names):
        rows, columns = RELEASED[name]
        tensors[f"lora_unet_{name}.lora_down.weight"] = drawn((r, columns), 2 * i)
        tensors[f"lora_unet_{name}.lora_up.weight"] = drawn((rows, r), 2 * i + 1)
        # diffusers leaves out alpha of the last layers
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(r if name.startswith("final") else alpha)
    save_file(tensors, path)
    return tensors


def theirs(path):
    """What diffusers makes of a file: path -> (A, B)."""
    state = quiet(FluxLoraLoaderMixin.lora_state_dict, path.parent, weight_name=path.name)
    state = {key.removeprefix("transformer."): tensor for key, tensor in state.items()}
    stems = {key.split(".lora_")[0] for key in state}
    return {stem: (state[f"{stem}.lora_A.weight"], state[f"{stem}.lora_B.weight"]) for stem in stems}


def assert_same(adapter, expected):
    assert adapter.factors.keys() == expected.keys()
    for layer, f in adapter.factors.items():
        A, B = expected[layer]
        assert torch.equal(f.A * adapter.scale(layer), A)
        assert torch.equal(f.B, B)


def test_a_file_means_to_us_what_it_means_to_diffusers(published, tmp_path):
    file_of(tmp_path / "style.safetensors")
    adapter = Adapter.load(tmp_path / "style.safetensors", model=published)
    assert len(adapter.factors) == len(RELEASED) + 2 + 2 + 3
    assert_same(adapter, theirs(tmp_path / "style.safetensors"))


def test_factors_of_one_part_only_are_that_parts(published, tmp_path):
    """The trainer's `split_qkv` writes them so, and so do we."""
    names = ["double_blocks_0_img_attn_qkv", "single_blocks_0_linear1"]
    tensors = file_of(tmp_path / "style.safetensors", r=12, alpha=6.0, names=names)
    for name, rows in zip(names, ([D] * 3, [D] * 3 + [4 * D]), strict=True):
        up = tensors[f"lora_unet_{name}.lora_up.weight"]
        blocks = torch.block_diag(*(torch.ones(count, 12 // len(rows)) for count in rows))
        tensors[f"lora_unet_{name}.lora_up.weight"] = up * blocks
    save_file(tensors, tmp_path / "style.safetensors")
    adapter = Adapter.load(tmp_path / "style.safetensors", model=published)
    assert {f.r for f in adapter.factors.values()} == {3, 4}
    assert_same(adapter, theirs(tmp_path / "style.safetensors"))


def test_diffusers_reads_our_file(published, tmp_path):
    """Layers with factors of their own, then fused by us, are again what they were."""
    modules = {path: module for path, module in published.named_modules() if isinstance(module, nn.Linear)}
    tensors = {}
    for i, (path, module) in enumerate(modules.items()):
        tensors[f"transformer.{path}.lora_A.weight"] = drawn((3, module.in_features), 2 * i)
        tensors[f"transformer.{path}.lora_B.weight"] = drawn((module.out_features, 3), 2 * i + 1)
    save_file(tensors, tmp_path / "separate.safetensors")
    adapter = Adapter.load(tmp_path / "separate.safetensors", model=published)
    adapter.save(tmp_path / "fused.safetensors", format="kohya", model=published)
    assert load_file(tmp_path / "fused.safetensors").keys() == {
        f"lora_unet_{name}.{part}" for name in RELEASED for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    assert_same(adapter, theirs(tmp_path / "fused.safetensors"))


@pytest.mark.parametrize("alone", [True, False], ids=["transformer", "pipeline"])
def test_what_is_written_computes_the_same_when_read(alone, tmp_path):
    """Ranks and scales differ, and a layer of the three that are one in the file has no update."""

    def build():
        return flux() if alone else nn.ModuleDict({"transformer": flux(), "text_encoder": text_encoder()})

    model = build()
    layers = tuple(layer for layer in LAYERS if layer != "add_k_proj")
    value = trained(model, LoRAConfig(r=4, alpha=6.0, target_modules=(*layers, *([] if alone else ["fc1"])), **UNEVEN))
    expected = run_flux(model if alone else model["transformer"])
    file = lorakit.adapters(model).save("default", tmp_path / "style.safetensors", format="kohya")
    again = build()
    lorakit.attach(again, file)
    torch.testing.assert_close(run_flux(again if alone else again["transformer"]), expected, rtol=1e-5, atol=1e-5)
    read = Adapter.load(file, model=build())
    assert len(read.factors) == len(value.factors) + 1  # the update of zero
    for layer in value.factors:
        torch.testing.assert_close(read.delta(layer), value.delta(layer))


def test_a_file_that_was_read_is_written_as_it_was(tmp_path, published):
    names = ["double_blocks_0_txt_attn_qkv", "single_blocks_0_linear1", "final_layer_adaLN_modulation_1"]
    before = file_of(tmp_path / "style.safetensors", alpha=4.0, names=names)
    adapter = Adapter.load(tmp_path / "style.safetensors", model=published)
    adapter.save(tmp_path / "again.safetensors", format="kohya", model=published)
    after = load_file(tmp_path / "again.safetensors")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_names_with_diffusers_own_layers_are_read(tmp_path):
    value = trained(flux(), LoRAConfig(r=2, target_modules=("to_q", "ff.net.2")))
    tensors = {}
    for layer, f in value.factors.items():
        name = f"lora_transformer_{layer.replace('.', '_')}"
        tensors |= {
            f"{name}.lora_down.weight": f.A,
            f"{name}.lora_up.weight": f.B,
            f"{name}.alpha": torch.tensor(f.alpha),
        }
    save_file(tensors, tmp_path / "style.safetensors")
    read = Adapter.load(tmp_path / "style.safetensors", model=flux())
    assert read.factors.keys() == value.factors.keys()
    for layer in value.factors:
        assert torch.equal(read.delta(layer), value.delta(layer))


def test_every_bad_tensor_is_listed_in_one_error(tmp_path):
    model = flux()
    trained(model, LoRAConfig(r=2, target_modules=LAYERS))
    file = lorakit.adapters(model).save("default", tmp_path / "style.safetensors", format="kohya")
    tensors = load_file(file)
    tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"] = torch.ones(47, 6)
    tensors["lora_unet_single_blocks_0_linear1.dora_scale"] = torch.ones(4)
    tensors["lora_unet_double_blocks_7_img_mlp_0.alpha"] = torch.tensor(2.0)
    del tensors["lora_unet_img_in.lora_down.weight"]
    tensors["lora_transformer_proj_out.lora_down.weight"] = torch.ones(1, 16)
    tensors["lora_transformer_proj_out.lora_up.weight"] = torch.ones(4, 1)
    save_file(tensors, file)
    with pytest.raises(AdapterFileError) as caught:
        Adapter.load(file, model=flux())
    for part in (
        "lora_unet_double_blocks_0_img_attn_qkv: its factors (6, 16) and (47, 6) do not fit",
        "lora_unet_single_blocks_0_linear1: dora_scale: DoRA",
        "lora_unet_double_blocks_7_img_mlp_0: no such layer in the model; nearest: lora_unet_double_blocks_0_img_",
        "lora_unet_img_in: lora_down.weight is missing",
        "lora_unet_final_layer_linear: a second update of proj_out",
    ):
        assert part in str(caught.value)
