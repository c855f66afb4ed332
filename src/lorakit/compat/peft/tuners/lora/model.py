"""`from peft.tuners.lora.model import LoraModel`."""

from lorakit.compat.peft.tuner import LoraModel

__all__ = ["LoraModel"]
