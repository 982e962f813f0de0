"""Two ranks over gloo, forked from this process: what they say to one another costs no start of Python."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ftrun.errors import worded
from ftrun.train.ranks import Ranks


def pair(work: Callable[[Ranks], Any]) -> list[Any]:
    """What `work` gives on each of two ranks, or [exit code, message] of what it raises there."""
    with tempfile.TemporaryDirectory() as folder:
        children = [_child(work, rank, Path(folder)) for rank in range(2)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert codes == [0, 0]
        return [json.loads((Path(folder) / str(rank)).read_text()) for rank in range(2)]


def _child(work: Callable[[Ranks], Any], rank: int, folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    try:
        dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
        try:
            found = work(Ranks(rank, 2))
        except Exception as error:
            found = worded(error)
        (folder / str(rank)).write_text(json.dumps(found))
        dist.barrier()
        os._exit(0)
    finally:
        os._exit(1)
