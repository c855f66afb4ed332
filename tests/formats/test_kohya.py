"""Kohya's files, both ways, against diffusers; and what a bad file says."""

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file, save_file
from torch import nn

import lorakit
from adapter.models import CASES, randomise
from formats.diffusion import (
    TEXT_LAYERS,
    UNET_LAYERS,
    UNEVEN,
    components,
    flux,
    outputs,
    pipeline_of,
    quiet,
    run_unet,
    text_encoder,
    trained,
    unet,
)
from lorakit import Adapter, LoRAConfig
from lorakit.errors import AdapterFileError
from lorakit.files import read_safetensors_header
from lorakit.formats import obstacles
from lorakit.formats.codec import BaseFacts, Context

SETTINGS = {
    "plain": {"alpha": 8.0},
    "uneven": {"alpha": 6.0, **UNEVEN},
    "rslora": {"alpha": 3.0, "scaling": "rslora", **UNEVEN},
}


@pytest.fixture
def file(tmp_path):
    trained(model := unet(), LoRAConfig(r=4, alpha=6.0, target_modules=UNET_LAYERS, **UNEVEN))
    return lorakit.adapters(model).save("default", tmp_path / "style.safetensors", format="kohya")


@pytest.mark.parametrize(("setting", "xl"), [("plain", False), ("rslora", False), ("uneven", True)])
def test_diffusers_reads_our_file_and_computes_what_we_compute(xl, setting, tmp_path):
    parts = components(xl=xl)
    layers = (*UNET_LAYERS, *TEXT_LAYERS, *(["text_projection"] if xl else []))
    trained(parts, LoRAConfig(r=4, target_modules=layers, **SETTINGS[setting]))
    expected = outputs(parts)
    lorakit.adapters(parts).save("default", tmp_path / "style.safetensors", format="kohya")
    theirs = components(xl=xl)
    quiet(pipeline_of(theirs).load_lora_weights, tmp_path, weight_name="style.safetensors")
    for name, output in outputs(theirs).items():
        torch.testing.assert_close(output, expected[name], rtol=1e-4, atol=1e-5)
    ours = components(xl=xl)
    lorakit.attach(ours, tmp_path / "style.safetensors")
    for name, output in outputs(ours).items():
        torch.testing.assert_close(output, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("setting", SETTINGS)
def test_lycoris_which_finds_layers_as_kohyas_trainers_do_reads_our_file(setting, tmp_path, monkeypatch):
    from lycoris.kohya import LycorisNetworkKohya, create_network_from_weights

    # what it would adapt by itself, where it stumbles over time_embedding; the file's layers are found all the same
    monkeypatch.setattr(LycorisNetworkKohya, "UNET_TARGET_REPLACE_NAME", [])
    parts = nn.ModuleDict(
        {"unet": unet(), "text_encoder": text_encoder(projecting=True)}
    )  # has text_model in its paths
    value = trained(parts, LoRAConfig(r=4, target_modules=(*UNET_LAYERS, *TEXT_LAYERS), **SETTINGS[setting]))
    expected = outputs(parts)
    file = lorakit.adapters(parts).save("default", tmp_path / "style.safetensors", format="kohya")
    lorakit.adapters(parts).detach()
    pair = parts["text_encoder"], parts["unet"]
    network, _ = quiet(create_network_from_weights, 1.0, str(file), None, *pair)
    assert len(network.unet_loras + network.text_encoder_loras) == len(value.factors)
    network.apply_to(*pair, True, True)
    for name, output in outputs(parts).items():
        torch.testing.assert_close(output, expected[name], rtol=1e-4, atol=1e-5)


def test_names_shapes_and_alpha_of_the_tensors(tmp_path):
    parts = components(xl=True)
    trained(parts, LoRAConfig(r=4, alpha=8.0, target_modules=(*UNET_LAYERS, *TEXT_LAYERS)))
    written = lorakit.adapters(parts).save("default", tmp_path, format="kohya")
    assert written.name == "pytorch_lora_weights.safetensors"
    tensors = load_file(written)
    block = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_attn2_to_out_0"
    assert tensors[f"{block}.lora_down.weight"].shape == (4, 32)
    assert tensors["lora_unet_down_blocks_0_resnets_1_conv2.lora_down.weight"].shape == (4, 16, 3, 3)
    assert tensors["lora_unet_down_blocks_0_resnets_1_conv2.lora_up.weight"].shape == (16, 4, 1, 1)
    assert {float(t) for name, t in tensors.items() if name.endswith(".alpha")} == {4.0}
    assert "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.alpha" in tensors  # the model's path lacks text_model
    assert "lora_te2_text_model_encoder_layers_1_mlp_fc2.alpha" in tensors
    up = tensors[f"{block}.lora_up.weight"]
    path = "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_out.0"
    torch.testing.assert_close(up, lorakit.adapters(parts).extract().factors[path].B * 2)
    assert read_safetensors_header(written)[1] == {"format": "pt"}


@pytest.mark.parametrize("setting", SETTINGS)
def test_saving_what_was_loaded_gives_the_same_bytes(setting, tmp_path):
    config = LoRAConfig(r=4, target_modules=UNET_LAYERS, **SETTINGS[setting])
    value, model = trained(unet(), config), unet()
    first = value.save(tmp_path / "a.safetensors", format="kohya")
    again = Adapter.load(first, model=model)
    assert again.save(tmp_path / "b.safetensors", format="kohya").read_bytes() == first.read_bytes()
    for path in value.factors:
        torch.testing.assert_close(again.delta(path), value.delta(path), rtol=1e-5, atol=1e-7)
    again.save(tmp_path / "peft")
    lorakit.attach(model, tmp_path / "peft")  # its config means these layers and no others


def test_an_alpha_of_the_file_scales_and_a_missing_one_does_not(file):
    tensors = load_file(file)
    base = Adapter.load(file, model=unet())
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_v"
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_v"
    tensors[f"{name}.alpha"] = torch.tensor([1.0], dtype=torch.float16)
    save_file(tensors, file)
    torch.testing.assert_close(Adapter.load(file, model=unet()).delta(path), base.delta(path) / 4)
    del tensors[f"{name}.alpha"]
    save_file(tensors, file)
    torch.testing.assert_close(Adapter.load(file, model=unet()).delta(path), base.delta(path))


# the names of SDXL's trainers for layers of `xl_unet`, spelled out by hand
RELEASED = {
    "conv_in": "input_blocks_0_0",
    "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0",
    "down_blocks.0.resnets.1.conv1": "input_blocks_2_0_in_layers_2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
    "down_blocks.1.resnets.0.time_emb_proj": "input_blocks_4_0_emb_layers_1",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks_4_0_skip_connection",
    "down_blocks.1.attentions.1.transformer_blocks.1.attn2.to_k": "input_blocks_5_1_transformer_blocks_1_attn2_to_k",
    "mid_block.resnets.1.conv2": "middle_block_2_out_layers_3",
    "mid_block.attentions.0.proj_in": "middle_block_1_proj_in",
    "up_blocks.0.resnets.2.conv1": "output_blocks_2_0_in_layers_2",
    "up_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj": (
        "output_blocks_0_1_transformer_blocks_0_ff_net_0_proj"
    ),
    "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
    "up_blocks.1.resnets.0.conv1": "output_blocks_3_0_in_layers_2",
    "conv_out": "out_2",
}


def test_the_names_of_sdxl_trainers_are_read_and_mean_what_diffusers_takes_them_for(tmp_path):
    parts = components(xl=True)
    value = trained(parts, LoRAConfig(r=2, alpha=2.0, target_modules=tuple(f"unet.{path}" for path in RELEASED)))
    expected = outputs(parts)
    tensors = {}
    for path in RELEASED:
        f, name = value.factors[f"unet.{path}"], f"lora_unet_{RELEASED[path]}"
        tensors |= {f"{name}.lora_down.weight": f.A, f"{name}.lora_up.weight": f.B, f"{name}.alpha": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "xl.safetensors")
    ours = components(xl=True)
    lorakit.attach(ours, tmp_path / "xl.safetensors")
    torch.testing.assert_close(run_unet(ours["unet"]), expected["unet"])
    theirs = components(xl=True)
    quiet(pipeline_of(theirs).load_lora_weights, tmp_path, weight_name="xl.safetensors")
    torch.testing.assert_close(run_unet(theirs["unet"]), expected["unet"], rtol=1e-4, atol=1e-5)


def test_two_styles_at_once_are_what_diffusers_makes_of_them(tmp_path):
    for number, layers in enumerate((("to_q", "to_v", "conv1"), ("to_q", "net.2"))):
        trained(model := unet(), LoRAConfig(r=2 + number, alpha=3.0, target_modules=layers), seed=number)
        lorakit.adapters(model).save("default", tmp_path / f"{number}.safetensors", format="kohya")
    parts = components()
    handle = lorakit.attach(parts, tmp_path / "0.safetensors", name="ink")
    handle.load(tmp_path / "1.safetensors", "oil")
    handle.activate({"ink": 0.7, "oil": 0.4})
    theirs = pipeline_of(components())
    for name, number in (("ink", 0), ("oil", 1)):
        quiet(theirs.load_lora_weights, tmp_path, weight_name=f"{number}.safetensors", adapter_name=name)
    theirs.set_adapters(["ink", "oil"], [0.7, 0.4])
    torch.testing.assert_close(run_unet(parts["unet"]), run_unet(theirs.unet), rtol=1e-4, atol=1e-5)
    handle.detach()
    torch.testing.assert_close(run_unet(parts["unet"]), run_unet(unet()), rtol=0, atol=0)


# ---------------------------------------------------------------- what cannot be


def test_reading_needs_the_model_and_says_how_to_name_it(file):
    with pytest.raises(AdapterFileError, match=r"model=\.\.\., or --model M"):
        Adapter.load(file)


def test_what_the_file_cannot_carry_is_named_and_nothing_is_written(tmp_path):
    parts = components()
    config = LoRAConfig(
        r=2, target_modules=("to_q", "fc1", "token_embedding"), modules_to_save=("conv_out",), bias="lora_only"
    )
    handle = lorakit.attach(parts, config)
    with pytest.raises(AdapterFileError) as caught:
        handle.save("default", tmp_path / "x.safetensors", format="kohya")
    text = str(caught.value)
    for part in (
        "text_encoder.embeddings.token_embedding: the update of an embedding",
        "unet.conv_out.weight: trained whole",
        "text_encoder.encoder.layers.0.mlp.fc1: a trained bias",
    ):
        assert part in text
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["llama", "convolutions"])
def test_models_that_are_no_pipeline_are_refused(name, tmp_path):
    model = CASES[name].build()
    randomise(lorakit.attach(model, LoRAConfig(r=2, target_modules=CASES[name].targets)))
    with pytest.raises(AdapterFileError, match="of no component of a diffusion pipeline"):
        lorakit.adapters(model).save("default", tmp_path / "x.safetensors", format="kohya")


def test_a_transformer_is_refused_where_it_is_not_known_to_be_flux():
    value = trained(flux(), LoRAConfig(r=2, target_modules=("to_q",)))
    problems = obstacles(value, "kohya")
    assert len(problems) == 2
    assert all("name the model, if it is Flux, or use diffusers" in problem for problem in problems)
    torch.manual_seed(0)
    other = SD3Transformer2DModel(
        sample_size=8, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10,
    )  # fmt: skip
    value = trained(other, LoRAConfig(r=2, target_modules=("to_q",)))
    (problem,) = obstacles(value, "kohya", Context(base=BaseFacts.of(other)))
    assert "by other layers than diffusers' (use diffusers)" in problem


def test_paths_that_would_get_one_name_are_refused(tmp_path):
    inner = nn.ModuleDict({"a": nn.ModuleDict({"b_c": nn.Linear(4, 4)}), "a_b": nn.ModuleDict({"c": nn.Linear(4, 4)})})
    parts = nn.ModuleDict({"unet": inner})
    value = trained(parts, LoRAConfig(r=2, target_modules=("a.b_c",)))
    assert obstacles(value, "kohya") == []
    with pytest.raises(AdapterFileError, match=r"unet\.a\.b_c and unet\.a_b\.c are both written lora_unet_a_b_c"):
        lorakit.adapters(parts).save("default", tmp_path / "x.safetensors", format="kohya")
    value.save(tmp_path / "x.safetensors", format="kohya")
    with pytest.raises(AdapterFileError, match=r"could mean unet\.a\.b_c or unet\.a_b\.c"):
        Adapter.load(tmp_path / "x.safetensors", model=parts)


def test_every_bad_tensor_is_listed_in_one_error(file):
    tensors = load_file(file)
    stems = sorted({name.split(".")[0] for name in tensors if "attn1_to" in name})
    del tensors[f"{stems[0]}.lora_up.weight"]
    tensors[f"{stems[1]}.alpha"] = torch.tensor(0.0)
    tensors[f"{stems[2]}.dora_scale"] = torch.ones(4)
    tensors[f"{stems[3]}.lora_down.weight"] = torch.ones(4, 5)
    tensors["lora_unet_down_blocks_9_conv1.lora_up.weight"] = torch.ones(3)
    tensors["surprise"] = torch.ones(3)
    save_file(tensors, file)
    with pytest.raises(AdapterFileError) as caught:
        Adapter.load(file, model=unet())
    for part in (
        f"{stems[0]}: lora_up.weight is missing",
        f"{stems[1]}: its alpha is",
        f"{stems[2]}: dora_scale: DoRA",
        f"{stems[3]}: its",
        "lora_unet_down_blocks_9_conv1: no such layer in the model; nearest: lora_unet_down_blocks_",
        "surprise: no such layer",
    ):
        assert part in str(caught.value)


def test_a_layer_under_two_names_is_an_error(file):
    tensors = load_file(file)
    part = "lora_down.weight", "lora_up.weight"
    tensors |= {
        f"lora_unet_middle_block_0_in_layers_2.{p}": tensors[f"lora_unet_mid_block_resnets_0_conv1.{p}"].clone()
        for p in part
    }
    save_file(tensors, file)
    with pytest.raises(AdapterFileError, match=r"a second update of mid_block\.resnets\.0\.conv1"):
        Adapter.load(file, model=unet())


def test_nan_and_damage_are_errors(file):
    data = file.read_bytes()
    tensors = load_file(file)
    next(iter(tensors.values())).fill_(float("nan"))
    save_file(tensors, file)
    with pytest.raises(AdapterFileError, match=r"NaN|nan"):
        Adapter.load(file, model=unet())
    file.write_bytes(data[:-10])
    with pytest.raises(AdapterFileError, match=r"cut short|not an adapter"):
        Adapter.load(file, model=unet())
