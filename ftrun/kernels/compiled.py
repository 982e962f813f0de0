"""The CPU's own kernels: C++ beside this file, compiled once a machine into the cache and called by address.

They are built by the machine's C++ compiler for the very processor at hand (the sources take a second or two), and
share torch's threads. Where there is no compiler, models run by their own code: the same maths, more slowly.
On CUDA the same operators are torch's own code, compiled by torch (Triton) when they are first called.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ftrun.errors import is_out_of_memory
from ftrun.runs import cache_dir

_SOURCES = Path(__file__).parent / "native"
_FLAGS: tuple[str, ...] = ("-O3", "-march=native", "-mprefer-vector-width=512", "-fno-math-errno", "-fno-trapping-math")
_FLAGS += ("-fopenmp", "-fPIC", "-shared", "-std=c++17")
_PATIENCE = 300  # seconds that a compiler may take
_INT, _LONG, _FLOAT, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_DTYPES = {"cpu": {torch.float32, torch.bfloat16}, "cuda": {torch.float32, torch.bfloat16, torch.float16}}
_VIEW = (_POINTER, _LONG, _LONG)  # address, elements from token to token and from head to head
_ATTENDED = (_LONG, _POINTER, _LONG, _LONG, _LONG, _FLOAT, _LONG, *_VIEW, *_VIEW, *_VIEW)
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "rms_norm": (_INT, _LONG, _LONG, _POINTER, _POINTER, _FLOAT, _INT, _POINTER, _POINTER, _INT),
    "rms_norm_backward": (_INT, _LONG, _LONG, *[_POINTER] * 4, _INT, _POINTER, _INT),
    "gated": (_INT, _INT, _LONG, _LONG, _LONG, *[_POINTER] * 3, _INT),
    "gated_backward": (_INT, _INT, _LONG, _LONG, _LONG, *[_POINTER] * 5, _INT),
    "rope": (_INT, *[_LONG] * 4, *_VIEW, _POINTER, _POINTER, *_VIEW, _INT, _INT),
    "cross_entropy": (_INT, _LONG, _LONG, _POINTER, _POINTER, _FLOAT, _FLOAT, _INT, _POINTER, _INT),
    "scale_columns_backward": (_INT, _LONG, _LONG, *[_POINTER] * 5, _INT),
    "linear": (_LONG, _LONG, _LONG, _POINTER, _LONG, *[_POINTER] * 4, _INT),
    "cross": (_LONG, _LONG, _LONG, *[_POINTER] * 4, _INT),
    "dequantise_4bit": (_INT, _LONG, _POINTER, _POINTER, _LONG, _POINTER, _POINTER, _INT),
    "attention": (*_ATTENDED, _POINTER, _POINTER, _POINTER, _LONG, _INT),
    "attention_backward": (*_ATTENDED, *[_POINTER] * 8, _LONG, _INT),
}
_SCRATCH = {"attention": (_LONG, _LONG, _INT), "linear": (_LONG, _LONG, _LONG, _INT)}


def takes(*tensors: torch.Tensor) -> bool:
    """Whether these operators run on such tensors, where they lie or are planned to lie; all must have one dtype."""
    device, dtypes = place(tensors[0]), {t.dtype for t in tensors}
    if len(dtypes) > 1 or not dtypes <= _DTYPES.get(device, set()):
        return False
    return device != "cpu" or library() is not None


def place(tensor: torch.Tensor) -> str:
    """The type of device that the tensor lies on; a plan's fake tensor lies on the CPU whatever it stands for."""
    return _PLANNED.get() or tensor.device.type


@contextlib.contextmanager
def planned_for(device: str) -> Iterator[None]:
    """Within the block tensors stand for such ones on a device of this type."""
    token = _PLANNED.set(device)
    try:
        yield
    finally:
        _PLANNED.reset(token)


@functools.cache
def tiles_at_hand() -> bool:
    """Whether the processor and the system let kernels run on AMX tiles."""
    found = library()
    return found is not None and bool(found.ftrun_tiles_work())


def call(name: str, *args: Any) -> None:
    """The kernel ftrun_NAME on the CPU: tensors go by address, and torch's number of threads comes last."""
    found = library()
    assert found is not None, f"ftrun::{name} was called where no kernel could be compiled"
    given = (arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args)
    getattr(found, f"ftrun_{name}")(*given, torch.get_num_threads())


def scratch(kernel: str, *sizes: int) -> int:
    """Bytes that a kernel works in, beside its outputs: ftrun_KERNEL_scratch, for these sizes."""
    found = library()
    return 0 if found is None else int(getattr(found, f"ftrun_{kernel}_scratch")(*sizes))


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels, compiled now or before; None where that cannot be (`trouble` says why)."""
    try:
        found = ctypes.CDLL(str(_built()))
    except (OSError, subprocess.SubprocessError) as error:
        _trouble.append(str(error))
        return None
    for name, kinds in _SIGNATURES.items():
        if hasattr(found, f"ftrun_{name}"):
            getattr(found, f"ftrun_{name}").argtypes = kinds
            getattr(found, f"ftrun_{name}").restype = None
    for name, kinds in _SCRATCH.items():
        if hasattr(found, f"ftrun_{name}_scratch"):
            getattr(found, f"ftrun_{name}_scratch").argtypes = kinds
            getattr(found, f"ftrun_{name}_scratch").restype = _LONG
    return found


def trouble() -> str | None:
    """Why there are no compiled kernels on this CPU; None where there are."""
    return None if library() is not None else _trouble[-1]


_trouble: list[str] = []
_PLANNED: contextvars.ContextVar[str | None] = contextvars.ContextVar("planned", default=None)


def on_cuda(plain: Callable[..., Any]) -> Callable[..., Any]:
    """`plain`, compiled by torch for tensors on CUDA, for any sizes, at its first call; as it is where that fails."""

    @functools.cache
    def compiled() -> list[Callable[..., Any]]:
        compilers_cache()
        return [torch.compile(plain, dynamic=True)]

    def run(*args: Any) -> Any:
        try:
            return compiled()[0](*args)
        except Exception as error:  # Triton without a C compiler, say: the same operations, one after another
            if compiled()[0] is plain or is_out_of_memory(error):
                raise
            warnings.warn(f"{plain.__name__}: not compiled for CUDA, slower: {error}".splitlines()[0], stacklevel=2)
            compiled()[0] = plain
            return plain(*args)

    return functools.wraps(plain)(run)


def compilers_cache() -> Path:
    """Where torch's compiler keeps what it made: a folder of ours that the user alone may enter, for it holds pickles
    and code, and reads them back. A place that the user has named by TORCHINDUCTOR_CACHE_DIR stays theirs.
    """
    path = Path(os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "compile")))
    os.environ.setdefault("TRITON_CACHE_DIR", str(path / "triton"))
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path == cache_dir() / "compile":
        path.chmod(0o700)
    return path


def _built() -> Path:
    """The shared library in the cache; compiled aside and renamed, so that jobs started together do not meet."""
    if os.name != "posix" or platform.machine() not in ("x86_64", "AMD64", "aarch64", "arm64"):
        raise OSError(f"no kernels are written for {platform.machine()}")
    compiler = os.environ.get("CXX") or next((c for c in ("g++", "c++", "clang++") if shutil.which(c)), None)
    if compiler is None:
        raise OSError("there is no C++ compiler (g++)")
    sources = sorted(_SOURCES.glob("*.cpp"))
    path = cache_dir() / "kernels" / f"{_digest(compiler)}.so"
    if not path.is_file():
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as aside:
            made = Path(aside) / "kernels.so"
            command = [*compiler.split(), *_flags(), *map(str, sources), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE)
            if done.returncode:
                raise OSError(f"{compiler}: {done.stderr.strip().splitlines()[-1:] or done.returncode}")
            made.replace(path)
    return path


def _flags() -> list[str]:
    wide = platform.machine() in ("x86_64", "AMD64")
    return [flag for flag in _FLAGS if wide or "vector-width" not in flag]


def _digest(compiler: str) -> str:
    """What the compiled library depends on: the sources, the compiler, its flags and the machine."""
    found = hashlib.sha256(repr((compiler, _flags(), machine())).encode())
    for path in sorted(_SOURCES.iterdir()):
        found.update(path.read_bytes())
    return found.hexdigest()[:24]


@functools.cache
def machine() -> str:
    """A name for this processor's instructions and this torch: what was found out on one holds on no other."""
    found = hashlib.sha256(repr((torch.__version__, platform.machine())).encode())
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        found.update(next((line for line in lines if line.startswith(("flags", "Features"))), "").encode())
    return found.hexdigest()[:16]
