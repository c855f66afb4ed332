"""Errors of the facade: lorakit's own, that are also of the built-in classes which scripts written for PEFT catch."""

from __future__ import annotations

from lorakit.errors import AdapterError, AdapterMismatchError, ConfigError, TargetError


class PeftValueError(AdapterError, ValueError):
    """An operation that cannot be done; PEFT raises ValueError there."""


class UnsupportedError(ConfigError, NotImplementedError):
    """Something PEFT has and this version has not."""


class MismatchError(AdapterMismatchError, RuntimeError):
    """Tensors that do not fit the model; PEFT raises RuntimeError there."""


class NoMatchingPeftModuleError(TargetError):
    """A config that means no module of the model, or something else that is not there."""


class NoBiasError(AdapterError, RuntimeError):
    """A bias of B that cannot be merged into a layer without one; PEFT raises RuntimeError there."""


class PeftWarning(UserWarning):
    """What PEFT warns of, where the facade does too."""
