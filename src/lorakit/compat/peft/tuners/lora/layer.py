"""`from peft.tuners.lora.layer import LoraLayer`."""

from lorakit.compat.peft.lora_layers import LoraLayer
from lorakit.compat.peft.parameters import ParamWrapper

__all__ = ["LoraLayer", "ParamWrapper"]
