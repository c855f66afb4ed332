"""`AutoPeftModelFor...`: an adapter together with its base, which the adapter's config names."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from lorakit.compat.peft.config import PeftConfig, TaskType
from lorakit.compat.peft.errors import PeftValueError
from lorakit.compat.peft.files import adapter_folder
from lorakit.compat.peft.model import TASK_CLASSES, PeftModel


class AutoPeftModel:
    """Load an adapter together with its base, which its config names."""

    task: ClassVar[str | None] = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load both.

        Args:
            pretrained_model_name_or_path: the adapter's folder or repository.
            adapter_name: its name in the model.
            is_trainable: whether it can be trained further.
            config: to use in place of the file's.
            revision: of the adapter.
            **kwargs: for the base's `from_pretrained` (dtype ...), and `subfolder`, `token`.

        Raises:
            PeftValueError: the adapter does not name its base, its base is no model of transformers, or it is for
            another task.
        """
        import transformers

        own = {name: kwargs.pop(name) for name in ("subfolder",) if name in kwargs}
        shared = {name: kwargs[name] for name in ("token", "cache_dir") if name in kwargs}
        folder = adapter_folder(pretrained_model_name_or_path, revision=revision, **own, **shared)
        found = PeftConfig.from_pretrained(folder) if config is None else config
        task = found.task_type
        if cls.task is not None and task is not None and task != cls.task:
            raise PeftValueError(f"Expected an adapter for {cls.task}, but this one is for {task}")
        kind = str(cls.task or task or "")
        if not found.base_model_name_or_path:
            raise PeftValueError(f"{folder}: does not name its base; load the base and use PeftModel.from_pretrained")
        own_class = (found.auto_mapping or {}).get("base_model_class") if not kind else None
        loader: Any = getattr(transformers, own_class or _AUTO_CLASSES.get(kind, "AutoModel"), None)
        if not hasattr(loader, "from_pretrained"):  # only what transformers itself has is ever imported
            raise PeftValueError(
                f"{folder}: its base is a {own_class}, which is not transformers'; load it and use "
                "PeftModel.from_pretrained"
            )
        base = loader.from_pretrained(found.base_model_name_or_path, revision=found.revision, **kwargs)
        made = TASK_CLASSES.get(kind, PeftModel)
        return made.from_pretrained(base, folder, adapter_name, is_trainable=is_trainable, config=config)


_AUTO_CLASSES: dict[str, str] = {
    TaskType.CAUSAL_LM: "AutoModelForCausalLM",
    TaskType.SEQ_2_SEQ_LM: "AutoModelForSeq2SeqLM",
    TaskType.SEQ_CLS: "AutoModelForSequenceClassification",
    TaskType.TOKEN_CLS: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS: "AutoModelForQuestionAnswering",
    TaskType.FEATURE_EXTRACTION: "AutoModel",
}


class AutoPeftModelForCausalLM(AutoPeftModel):
    """For language models."""

    task = TaskType.CAUSAL_LM


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """For encoder-decoders."""

    task = TaskType.SEQ_2_SEQ_LM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """For classifiers."""

    task = TaskType.SEQ_CLS


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """For token classifiers."""

    task = TaskType.TOKEN_CLS


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """For span finders."""

    task = TaskType.QUESTION_ANS


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """For encoders."""

    task = TaskType.FEATURE_EXTRACTION
