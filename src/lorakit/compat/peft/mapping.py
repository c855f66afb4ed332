"""`from peft.mapping import inject_adapter_in_model`."""

from lorakit.compat.peft.functions import get_peft_model, inject_adapter_in_model

__all__ = ["get_peft_model", "inject_adapter_in_model"]
