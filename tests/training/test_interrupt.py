"""The first signal is a request, the second one acts as before, and handlers are given back."""

import os
import signal
import threading

import pytest

from lorakit.training.interrupt import stop_request


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_is_remembered_and_handlers_are_restored(number):
    before = signal.getsignal(number)
    with stop_request() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop.signal == number
    assert signal.getsignal(number) is before


def test_second_interrupt_stops_at_once():
    # what was there before may be to ignore it: so it is in a process that a shell has put into the background
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with stop_request() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_nothing_is_installed():
    before, seen = signal.getsignal(signal.SIGINT), []

    def work():
        with stop_request() as stop:
            seen.append((bool(stop), signal.getsignal(signal.SIGINT) is before))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, True)]
