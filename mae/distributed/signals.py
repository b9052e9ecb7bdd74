"""Signals that ask a run to stop."""

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType


class Interruption:
    """Turns SIGTERM, SIGUSR2 and Ctrl-C into a flag that the train loop reads between steps.

    A second Ctrl-C interrupts at once. It must come a second later, since a rank receives the first one twice: from
    the terminal and from its launcher. On exit the earlier handlers return.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
    SAME_S = 1.0

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.received_at = 0.0
        self.previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                self.previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler if isinstance(handler, Callable | int) else signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = self.received is signal.SIGINT and number == signal.SIGINT
        if again and time.monotonic() - self.received_at < self.SAME_S:
            return
        self.received, self.received_at = signal.Signals(number), time.monotonic()
        if again:
            raise KeyboardInterrupt
