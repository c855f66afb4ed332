"""Tiny pipelines built from configs, and random adapters for them; shared by the tests of diffusion formats."""

from __future__ import annotations

import warnings

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import lorakit
from lorakit import Adapter, LoRAConfig

# every layer that multiplies, of UNets and of CLIP's text encoders
UNET_LAYERS = (
    *("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "proj_in", "proj_out", "conv1", "conv2"),
    *("conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv", "conv_in", "conv_out"),
    *("linear_1", "linear_2"),
)
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
UNEVEN = {"rank_pattern": {"to_q": 2, "to_k": 3}, "alpha_pattern": {"to_q": 5.0, "to_v": 1.0}}


def unet(seed: int = 0, **changes) -> UNet2DConditionModel:
    """A UNet as Stable Diffusion 1's: attention with 1x1 convolutions around it."""
    torch.manual_seed(seed)
    settings = {
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "sample_size": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 24,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
    }
    return UNet2DConditionModel(**settings | changes).eval()


def xl_unet(seed: int = 0) -> UNet2DConditionModel:
    """As SDXL's: linear layers around attention, several blocks of it, an embedding of sizes."""
    return unet(
        seed,
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=2,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 24,
    )


def text_encoder(seed: int = 0, *, projecting: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, vocab_size=50,
        max_position_embeddings=12, projection_dim=24, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projecting else CLIPTextModel)(config).eval()


def components(seed: int = 0, *, xl: bool = False) -> nn.ModuleDict:
    """What an adapter of a whole pipeline is attached to."""
    parts = {"unet": (xl_unet if xl else unet)(seed), "text_encoder": text_encoder(seed)}
    if xl:
        parts["text_encoder_2"] = text_encoder(seed + 1, projecting=True)
    return nn.ModuleDict(parts).eval()


def flux(seed: int = 0) -> FluxTransformer2DModel:
    torch.manual_seed(seed)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(2, 2, 4),
    ).eval()  # fmt: skip


def run_unet(model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x, text = (torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 5, 24)))
    more = {}
    if model.config.addition_embed_type:
        more["added_cond_kwargs"] = {"text_embeds": text[:, 0], "time_ids": torch.arange(12).reshape(2, 6)}
    with torch.no_grad():
        return model(x, 3, text, **more).sample


def run_text(model: nn.Module) -> torch.Tensor:
    ids = torch.tensor([[0, 7, 9, 4, 1], [0, 3, 2, 8, 1]])
    with torch.no_grad():
        output = model(ids)
    return output.text_embeds if "text_embeds" in output else output.last_hidden_state


def run_flux(model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x, text, pooled = (torch.randn(shape, generator=generator) for shape in ((1, 4, 4), (1, 3, 12), (1, 10)))
    with torch.no_grad():
        return model(
            hidden_states=x, encoder_hidden_states=text, pooled_projections=pooled, timestep=torch.tensor([0.5]),
            img_ids=torch.zeros(4, 3), txt_ids=torch.zeros(3, 3),
        ).sample  # fmt: skip


def outputs(parts: nn.ModuleDict) -> dict[str, torch.Tensor]:
    """What each component computes."""
    return {name: run_unet(part) if name == "unet" else run_text(part) for name, part in parts.items()}


def trained(model: nn.Module, config: LoRAConfig, seed: int = 0) -> Adapter:
    """A random adapter; the model is left active with it."""
    handle = lorakit.attach(model, config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in handle.trainable_tensors().values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return handle.extract()


def pipeline_of(parts: nn.ModuleDict) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """diffusers' own pipeline of these components."""
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    common = {"vae": vae, "tokenizer": None, "scheduler": DDIMScheduler(steps_offset=1, clip_sample=False), **parts}
    if "text_encoder_2" in parts:
        return StableDiffusionXLPipeline(tokenizer_2=None, **common)
    return StableDiffusionPipeline(safety_checker=None, feature_extractor=None, **common)


def quiet(function, *args, **kwargs):
    """Call another library without the warnings it gives of itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)
