"""`from peft.tuners.tuners_utils import BaseTunerLayer`."""

from lorakit.compat.peft.layers import BaseTunerLayer

__all__ = ["BaseTunerLayer"]
