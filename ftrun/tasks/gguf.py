"""A checkpoint as a GGUF file, by llama.cpp's own converter where the user has it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from ftrun.errors import UserError, unknown
from ftrun.runs import aside

SCRIPT = "convert_hf_to_gguf.py"
TYPES = ("f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0", "auto")  # of its --outtype
_LINES = 3  # of what the converter said, in a message


def find(kind: str, folder: str | None) -> Path:
    """The converter: in `folder`, in $LLAMA_CPP, or on PATH. Raises UserError where it, or the type, is unknown."""
    if kind not in TYPES:
        raise UserError(unknown("gguf: the type", kind, TYPES))
    given = folder or os.environ.get("LLAMA_CPP")
    if given:
        place = Path(given).expanduser()
        found = place if place.name == SCRIPT else place / SCRIPT
        if found.is_file():
            return found
        raise UserError(f"{'llama_cpp' if folder else 'LLAMA_CPP'}={given}: holds no {SCRIPT}")
    on_path = shutil.which(SCRIPT)
    if on_path is None:
        raise UserError(
            f"gguf={kind}: needs llama.cpp's {SCRIPT}, which is not here. Fetch it: git clone "
            "https://github.com/ggml-org/llama.cpp, then llama_cpp=DIR (or LLAMA_CPP=DIR)"
        )
    return Path(on_path)


def convert(converter: Path, folder: Path, kind: str) -> Path:
    """model-KIND.gguf in `folder`, of the checkpoint that lies there. Raises UserError with what the converter said."""
    target = folder / f"model-{kind}.gguf"
    with aside(target) as beside:
        command = [sys.executable, str(converter), str(folder), "--outfile", str(beside), "--outtype", kind]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not beside.is_file():
            said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()][-_LINES:]
            why = " / ".join(said) or "it said nothing"
            raise UserError(f"{converter}: failed ({done.returncode}): {why}. The merged model in {folder} is whole")
    return target
