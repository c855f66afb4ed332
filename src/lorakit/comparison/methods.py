"""What can be compared: names for settings of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lorakit.adapter.config import LoRAConfig
from lorakit.adapter.prompt_config import PromptConfig
from lorakit.config import plain_value
from lorakit.errors import ConfigError, nearest

# name -> settings of TrainConfig; those of the adapter under "lora", of a soft prompt under "prompt"
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"lora": {"scaling": "rslora"}},
    "dora": {"lora": {"delta": "dora"}},
    "gaussian": {"lora": {"init": "gaussian"}},
    "orthogonal": {"lora": {"init": "orthogonal"}},
    "olora": {"lora": {"init": "olora"}},
    "pissa": {"lora": {"init": "pissa"}},
    "eva": {"lora": {"init": "eva"}},
    "lora_ga": {"lora": {"init": "lora_ga"}},
    "lora_fa": {"lora": {"lora_fa": True}},
    "loftq": {"quantize": "nf4", "lora": {"init": "loftq"}},
    "loraplus": {"loraplus_lr_ratio": 16.0},
    "attention": {"lora": {"target_modules": "attention"}},
    "mlp": {"lora": {"target_modules": "mlp"}},
    "prompt": {"lora": {"target_modules": "none"}, "prompt": {"soft_prompt": "prompt"}},
    "prefix": {"lora": {"target_modules": "none"}, "prompt": {"soft_prompt": "prefix"}},
    "lora_prompt": {"prompt": {"soft_prompt": "prompt"}},
    "lora_prefix": {"prompt": {"soft_prompt": "prefix"}},
    "full": {"method": "full"},
}


@dataclass(frozen=True)
class Method:
    """One method of a comparison.

    Attributes:
        name: as it was written.
        settings: of TrainConfig, over those that all methods share.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)


def parse_method(text: str) -> Method:
    """A method from `name` or `name:setting=value:...`, settings being those of a LoRAConfig, a PromptConfig or a
    TrainConfig.

    >>> parse_method("lora:r=64").settings
    {'lora': {'r': 64}}

    Raises:
        ConfigError: an unknown name, with the nearest, or a setting without a value.
    """
    name, *parts = text.split(":")
    if name not in METHODS:
        guess = nearest(name, METHODS)
        raise ConfigError(
            f"methods: no method {name!r}; "
            + (f"nearest: {', '.join(guess)}" if guess else f"known: {', '.join(METHODS)}")
        )
    settings: dict[str, Any] = {k: dict(v) if isinstance(v, dict) else v for k, v in METHODS[name].items()}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"methods: {text!r}: {part!r} is no setting=value")
        sections = {"lora": LoRAConfig, "prompt": PromptConfig}
        section = next((name for name, config in sections.items() if _is_setting(key, config)), None)
        place = settings if section is None else settings.setdefault(section, {})
        place[key] = plain_value(value)
    return Method(text, settings)


def _is_setting(key: str, config: type[LoRAConfig] | type[PromptConfig]) -> bool:
    spelled = config.aliases.get(key, key)
    return spelled in config.__dataclass_fields__ or spelled in config.switches
