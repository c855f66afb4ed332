"""`from peft.utils.other import ModulesToSaveWrapper`."""

from lorakit.compat.peft.functions import prepare_model_for_kbit_training
from lorakit.compat.peft.lora_layers import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from lorakit.compat.peft.tokens import TrainableTokensWrapper

__all__ = [
    "AuxiliaryTrainingWrapper",
    "ModulesToSaveWrapper",
    "TrainableTokensWrapper",
    "prepare_model_for_kbit_training",
]
