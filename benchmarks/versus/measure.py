"""What is counted the same way on both sides."""

from __future__ import annotations

import resource
import statistics
from collections.abc import Sequence


def peak_gb() -> float:
    """The most memory this process has held, loading included."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)


def timed(tokens: Sequence[int], seconds: Sequence[float], losses: Sequence[float]) -> dict[str, object]:
    """The result of a side; where there are several steps, the first one was for warming up.

    Args:
        tokens: of all rows of each step, without padding.
        seconds: of each step.
        losses: of each step, the mean over its labelled tokens.
    """
    rates = [count / each for count, each in zip(tokens, seconds, strict=True)]
    return {
        "tokens_per_second": round(statistics.median(rates[1:] or rates), 1),
        "peak_gb": peak_gb(),
        "seconds": [round(each, 3) for each in seconds],
        "losses": [round(loss, 6) for loss in losses],
    }
