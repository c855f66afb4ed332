"""`from peft.tuners.lora import LoraLayer`."""

from lorakit.compat.peft.config import LoraConfig
from lorakit.compat.peft.lora_layers import LoraLayer
from lorakit.compat.peft.parameters import ParamWrapper
from lorakit.compat.peft.tuner import LoraModel

__all__ = ["LoraConfig", "LoraLayer", "LoraModel", "ParamWrapper"]
