"""`from peft.utils import ...`: what of it scripts use."""

from lorakit.compat.peft.config import PeftType, TaskType
from lorakit.compat.peft.files import load_peft_weights
from lorakit.compat.peft.functions import (
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from lorakit.compat.peft.lora_layers import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from lorakit.compat.peft.tokens import TrainableTokensWrapper

__all__ = [
    "AuxiliaryTrainingWrapper",
    "ModulesToSaveWrapper",
    "PeftType",
    "TaskType",
    "TrainableTokensWrapper",
    "get_peft_model_state_dict",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "set_peft_model_state_dict",
]
