"""How far a long piece of work is, said now and then."""

from __future__ import annotations

import time
from collections.abc import Callable


class Pace:
    """Counts up to `whole` and says so, `form` with {done} and {whole}, `seconds` apart at least."""

    def __init__(self, say: Callable[[str], None], form: str, whole: int, seconds: float = 10.0) -> None:
        self.say, self.form, self.whole, self.seconds = say, form, whole, seconds
        self.done, self._said = 0, time.monotonic()

    def add(self, count: int) -> None:
        """So many more are done; the last ones are told by what follows them."""
        self.done += count
        if self.done < self.whole and time.monotonic() - self._said >= self.seconds:
            self._said = time.monotonic()
            self.say(self.form.format(done=self.done, whole=self.whole))
