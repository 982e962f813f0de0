"""A tracker in a thread of its own: what it waits for (a network, a disk), the run does not wait for."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ftrun.metrics.secrets import flat
from ftrun.values import EvalRecord, StepRecord

_END: Any = object()


class Background:
    """The sink of one of Accelerate's trackers.

    name: as the user chose it. make: (run folder, say) -> a tracker of `accelerate.tracking`, called in the thread.
    say: gets the lines for the user, always from the caller's own thread. every: send each so many steps.
    room: records that may wait; more are dropped, and counted. patience: seconds that `close` waits at most, a third of
    it where the tracker has not even started by then.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[Path, Callable[[str], None]], Any],
        say: Callable[[str], None],
        every: int = 1,
        room: int = 1000,
        patience: float = 15.0,
    ) -> None:
        self.name, self.every, self.patience = name, every, patience
        self.dropped = 0
        self._make, self._say = make, say
        self._waiting: queue.Queue[Any] = queue.Queue(room)
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._started, self._given_up = threading.Event(), threading.Event()

    def start(self, job: dict[str, Any], run: Path) -> None:
        """Begin, without waiting. The process's Accelerator must exist already: a thread must not make its state."""
        from accelerate import PartialState

        PartialState()  # Accelerate's loggers refuse to work without it; where it exists, this changes nothing
        self._thread = threading.Thread(target=self._work, args=(flat(job), run), name=f"log-{self.name}", daemon=True)
        self._thread.start()

    def step(self, record: StepRecord) -> None:
        if record.step % self.every == 0 or record.step == 1:
            row = asdict(record)
            self._put((row.pop("step"), {f"train/{k}": v for k, v in row.items()}))
        self._tell()

    def evaluation(self, record: EvalRecord) -> None:
        row = asdict(record)
        row.update({k: v for k, v in row.pop("extra").items() if isinstance(v, int | float)})
        self._put((row.pop("step"), {f"eval/{k}": float(v) for k, v in row.items()}))
        self._tell()

    def say(self, text: str) -> None:
        """Lines are for log.txt."""

    def close(self, result: dict[str, Any] | None) -> None:
        """Send what waits, for `patience` seconds at most, and tell what was lost."""
        if self._thread is None:
            return
        patience = self.patience if self._started.is_set() else self.patience / 3
        self._put(_END, patience)
        self._thread.join(patience)
        if self._thread.is_alive():
            self._given_up.set()
            self._lines.put(f"{self.name}: still not done after {patience:g} s; the run ends without it")
        self._thread = None
        if self.dropped:
            self._lines.put(f"{self.name}: {self.dropped:,} records were dropped: it was slower than the run")
        self._tell()

    def _put(self, item: Any, timeout: float = 0.0) -> None:
        try:
            self._waiting.put(item, block=timeout > 0, timeout=timeout or None)
        except queue.Full:
            self.dropped += item is not _END

    def _tell(self) -> None:
        while not self._lines.empty():
            self._say(self._lines.get())

    def _work(self, config: dict[str, Any], run: Path) -> None:
        # a tracker is somebody else's code, over somebody else's network: whatever it raises, the run goes on
        try:
            tracker = self._make(run, self._lines.put)
            tracker.main_process_only = False  # sinks live in the main process only: ask nobody
            tracker.start()
            tracker.store_init_configuration(config)
            self._started.set()
        except BaseException as error:
            self._lines.put(f"{self.name}: could not start, the run goes on without it: {_brief(error)}")
            tracker = None
        self._send(tracker)

    def _send(self, tracker: Any) -> None:
        told = False
        while (item := self._waiting.get()) is not _END and not self._given_up.is_set():
            try:
                if tracker is not None:
                    tracker.log(item[1], step=item[0])
            except Exception as error:
                if not told:
                    self._lines.put(f"{self.name}: a record was not taken: {_brief(error)}")
                told = True
        try:
            if tracker is not None:
                tracker.finish()
        except Exception as error:
            self._lines.put(f"{self.name}: did not end well: {_brief(error)}")


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
