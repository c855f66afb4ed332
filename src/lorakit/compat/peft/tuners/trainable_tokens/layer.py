"""`from peft.tuners.trainable_tokens.layer import TrainableTokensLayer`."""

from lorakit.compat.peft.tokens import TrainableTokensLayer

__all__ = ["TrainableTokensLayer"]
