"""One task at a time beside the loop, in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Aside:
    """What a task raises is given back by `finish`, in the thread that asks."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    @property
    def busy(self) -> bool:
        """Whether a task is at work."""
        return self._thread is not None and self._thread.is_alive()

    def begin(self, task: Callable[[], object]) -> None:
        """Start a task; the one before must be finished."""
        assert self._thread is None, "a task was begun before the last one was finished"

        def work() -> None:
            try:
                task()
            except Exception as error:
                self._error = error

        self._thread = threading.Thread(target=work, name="ftrun-checkpoint")
        self._thread.start()

    def finish(self) -> Exception | None:
        """Wait for the task that is at work, if one is; what it raised."""
        if self._thread is not None:
            self._thread.join()
        error, self._thread, self._error = self._error, None, None
        return error
