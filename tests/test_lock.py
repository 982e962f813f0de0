"""A folder is one process's at a time; the lock dies with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ftrun import lock
from ftrun.errors import UserError

HOLD = (
    "import sys; from pathlib import Path; from ftrun.lock import Lock; Lock(Path(sys.argv[1])); print('held'); input()"
)


def test_a_second_process_is_refused_by_name_until_the_first_has_died(tmp_path: Path) -> None:
    code = HOLD.replace("; Lock(", "; kept = Lock(")
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    for look in (lock.Lock, lock.check_free):
        with pytest.raises(UserError, match=rf"process {holder.pid} on .* is at work there"):
            look(tmp_path)
    holder.kill()
    holder.communicate()
    lock.check_free(tmp_path)
    lock.Lock(tmp_path).release()


def test_a_lock_that_its_holder_removed_is_not_taken_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, calls = lock._locked, []

    def locked(handle: int) -> bool:
        calls.append(handle)
        if len(calls) == 1:
            (tmp_path / lock.NAME).unlink()
        return own(handle)

    monkeypatch.setattr(lock, "_locked", locked)
    held = lock.Lock(tmp_path)
    assert len(calls) == 2
    monkeypatch.undo()
    with pytest.raises(UserError, match="at work there"):
        lock.check_free(tmp_path)
    held.release()


def test_looking_touches_nothing(tmp_path: Path) -> None:
    lock.check_free(tmp_path)
    lock.check_free(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []
