"""Ctrl-C and SIGTERM as a request that the loop reads between steps. Knows no training."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class StopRequest:
    """`signal` is the first signal received, or None."""

    signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """While entered, the first SIGINT or SIGTERM sets the request and stops nothing; a second one acts as before.

    Outside the main thread, where Python allows no handlers, the request is never set.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def remember(number: int, frame: FrameType | None) -> None:
        request.signal = signal.Signals(number)
        restore()  # so that the second signal stops at once

    for number in _SIGNALS:
        signal.signal(number, remember)
    try:
        yield request
    finally:
        restore()
