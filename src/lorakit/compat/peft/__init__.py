"""PEFT's names over lorakit: `from lorakit.compat.peft import ...` in place of `from peft import ...`.

LoRA only; what else PEFT has raises `UnsupportedError`. Where this facade does something else than PEFT, because PEFT
is silently wrong there or because lorakit adapts layers in their place, docs/compat.md says so.
"""

from lorakit.compat.peft.auto import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
)
from lorakit.compat.peft.config import LoraConfig, PeftConfig, PeftType, TaskType
from lorakit.compat.peft.errors import (
    MismatchError,
    NoBiasError,
    NoMatchingPeftModuleError,
    PeftValueError,
    PeftWarning,
    UnsupportedError,
)
from lorakit.compat.peft.files import load_peft_weights
from lorakit.compat.peft.functions import (
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from lorakit.compat.peft.model import (
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from lorakit.compat.peft.status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from lorakit.compat.peft.tuner import LoraModel

__all__ = [
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "LoraConfig",
    "LoraModel",
    "MismatchError",
    "NoBiasError",
    "NoMatchingPeftModuleError",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PeftValueError",
    "PeftWarning",
    "TaskType",
    "TunerLayerStatus",
    "TunerModelStatus",
    "UnsupportedError",
    "get_base_model_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
]
