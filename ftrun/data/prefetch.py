"""Batches made ahead, in a thread, while the model computes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
_END = object()


def prefetch(items: Iterable[T], ahead: int = 2) -> Iterator[T]:
    """The items, up to `ahead` of them made before they are asked for.

    An exception of the items is raised where the failed item would have come. Closing the iterator (or letting it
    go) ends the thread. ahead=0 makes each when it is asked for.
    """
    if ahead < 1:
        yield from items
        return
    made: queue.Queue[tuple[object, BaseException | None]] = queue.Queue(ahead)
    stop = threading.Event()

    def put(item: object, error: BaseException | None = None) -> bool:
        while not stop.is_set():
            try:
                made.put((item, error), timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not put(item):
                    return
        except BaseException as error:
            put(_END, error)
        else:
            put(_END)

    thread = threading.Thread(target=work, name="ftrun-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item  # type: ignore[misc]
    finally:
        stop.set()
        thread.join(timeout=5)
