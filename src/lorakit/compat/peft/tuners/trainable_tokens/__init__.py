"""`from peft.tuners.trainable_tokens import TrainableTokensLayer`."""

from lorakit.compat.peft.tokens import TrainableTokensLayer

__all__ = ["TrainableTokensLayer"]
