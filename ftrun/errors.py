"""The errors that a user meets. Each carries one message and the process's exit code."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable

# how allocators say it: CUDA's, the CPU's, the libraries' of CUDA, C++, oneDNN (which tells no more)
_SHORT: tuple[str, ...] = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "_ALLOC_FAILED",
    "std::bad_alloc",
)
_SHORT += ("could not create a primitive", "could not execute a primitive", "could not create a memory object")


class UserError(ValueError):
    """The user's input is wrong: config, data or paths. One message, exit code 2."""

    exit_code = 2


class DoesNotFit(UserError):
    """The job does not fit the device. Exit code 3."""

    exit_code = 3


class RunFailed(RuntimeError):
    """The run failed while training: non-finite loss, lost worker. Exit code 4."""

    exit_code = 4


class Interrupted(RuntimeError):
    """The user or the scheduler stopped the run; a checkpoint is saved. Exit code 130."""

    exit_code = 130


def worded(error: Exception) -> tuple[int, str]:
    """An error's exit code and its message: one line of what is no error of ours, with its type."""
    if isinstance(error, UserError | RunFailed | Interrupted):
        return error.exit_code, str(error)
    return RunFailed.exit_code, f"{type(error).__name__}: {error}".splitlines()[0][:500]


def by_code(code: int, message: str) -> Exception:
    """The error that another process ended with, from its exit code."""
    kinds: tuple[type[Exception], ...] = (UserError, DoesNotFit, Interrupted)
    return next((kind for kind in kinds if kind.exit_code == code), RunFailed)(message)  # type: ignore[attr-defined]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator, Python's, the system's or torch's on any device, could not give what was asked."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SHORT)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that looks most like `name`, or None where nothing comes close."""
    names = [str(k) for k in known]
    starts = [k for k in names if k.startswith(str(name)) or (k and str(name).startswith(k))]
    longer = [k for k in starts if len(k) > len(str(name)) >= 3]
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    # a name that goes on where this one ends was meant rather than another one of its length
    return min(longer, key=len) if longer else close[0] if close else min(starts, key=len) if starts else None


def unknown(what: str, name: str, known: Iterable[str], *, listed: int = 12) -> str:
    """A message for an unknown name: what was found, the nearest valid one, and the valid ones."""
    names = sorted(str(k) for k in known)
    hint = nearest(name, names)
    guess = f" Did you mean {hint!r}?" if hint else ""
    more = f", … ({len(names)} in all)" if len(names) > listed else ""
    return f"{what} {name!r} is unknown.{guess} Valid: {', '.join(names[:listed])}{more}"
