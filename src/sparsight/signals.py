"""Ctrl-C and SIGTERM, which a scheduler sends before it kills: both stop the work in the same way.

Signals that come within a second are one: `timeout`, launchers and schedulers may send theirs to the process and to its
group. A further one stops at once, and one after that ends the process as the system does.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

SAME = 1.0  # seconds
NUMBERS: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """SIGTERM, which stops what Ctrl-C stops."""


class Stops:
    """A handler of signals that calls `first` with the exception at the first of them, and raises it at the second."""

    def __init__(self, first: Callable[[KeyboardInterrupt], None]) -> None:
        self.first = first
        self.stop: KeyboardInterrupt | None = None
        self._began = 0.0

    def __call__(self, number: int, *_: Any) -> None:
        """Handle one signal."""
        if self.stop is None:
            self._began = time.monotonic()
            self.stop = Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
            self.first(self.stop)
        elif time.monotonic() - self._began > SAME:
            signal.signal(number, signal.SIG_DFL)
            raise self.stop


@contextlib.contextmanager
def listening(first: Callable[[KeyboardInterrupt], None], *, ends: bool = False) -> Iterator[Stops]:
    """Call `first` at the first Ctrl-C or SIGTERM inside the block; the handlers before it are put back at the end.

    With `ends` the process ends with the block, and after a signal the handlers stay until then. Only the main thread can do
    so. A signal that is ignored stays so, as does the caller's own handler of SIGTERM.
    """
    stops = Stops(first)
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in NUMBERS:
            handler = signal.getsignal(number)
            ours = isinstance(handler, Stops) or handler is signal.SIG_DFL
            if handler not in (signal.SIG_IGN, None) and (ours or number == signal.SIGINT):
                before[number] = signal.signal(number, stops)
    try:
        yield stops
    finally:
        for number, handler in before.items() if not (ends and stops.stop) else ():
            signal.signal(number, handler)
            if isinstance(handler, Stops) and stops.stop is not None:  # its second signal is the second for both
                handler.stop, handler._began = stops.stop, stops._began


def was_terminated(error: BaseException | None) -> bool:
    """Whether an error came of SIGTERM, at any place in the chain of its causes."""
    while error is not None and not isinstance(error, Terminated):
        error = error.__cause__ or error.__context__
    return error is not None
