"""Ctrl-C and SIGTERM between two steps instead of amid one, so that there is a whole state to save."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def deferred_interruption() -> Iterator[threading.Event]:
    """Gives an event that the first SIGINT or SIGTERM sets; the second one acts at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread only
        yield asked
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def note(number, frame) -> None:
        asked.set()
        restore()

    for number in previous:
        signal.signal(number, note)
    try:
        yield asked
    finally:
        restore()
