"""`from peft.utils.save_and_load import get_peft_model_state_dict`."""

from lorakit.compat.peft.files import load_peft_weights
from lorakit.compat.peft.functions import get_peft_model_state_dict, set_peft_model_state_dict

__all__ = ["get_peft_model_state_dict", "load_peft_weights", "set_peft_model_state_dict"]
