"""`from peft.tuners.lora.config import LoraConfig`."""

from lorakit.compat.peft.config import LoraConfig

__all__ = ["LoraConfig"]
