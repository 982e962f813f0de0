"""The plan under a real limit on memory: a job that it refuses would have failed, one that it just admits runs.

    python scripts/limit.py

A process imports what a run imports, takes a limit on its address space (RLIMIT_AS) at what it then holds and so many
bytes more, and runs the job. The job: a tiny model with a large vocabulary on the reference path, whose logits take
some GB. Three processes: planned 10 % over what is free, refused (exit code 3); the same with refuse=false, which runs
out of memory and goes on with fewer rows at once (0, and result.json says so); planned 10 % under, just within the
share that the plan admits, which runs as it is (0). Exit code 1 where one of them ends otherwise.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
_CHILD = """
import resource, sys
import torch, transformers, accelerate
import ftrun.tasks.session, ftrun.optim.blockwise, ftrun.kernels.blockwise, ftrun.cli
free = int(sys.argv[1])
if free:
    held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + free, held + free))
sys.exit(ftrun.cli.main(sys.argv[2:]))
"""


def run(free: int, *words: str) -> tuple[int, str]:
    """(exit code, what it said) of a command line, with `free` bytes of address space beyond the imports (0: any)."""
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, str(free), *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return child.returncode, child.stdout + child.stderr


def job(folder: Path) -> list[str]:
    """The command line of a job of some GB that takes seconds."""
    sys.path.insert(0, str(ROOT))
    from tests.families import save_tiny

    save_tiny("llama", folder / "base", vocab_size=60_000, intermediate_size=128, max_position_embeddings=512)
    rows = [{"question": f"{n} " + "why " * 30, "answer": f"{n} " + "so " * 30} for n in range(32)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        f"model.path={folder / 'base'}", "data=jsonl", f"data.path={folder / 'rows.jsonl'}", "method=lora", "rank=4",
        "kernels=reference", "batch=16", "micro_batch=16", "checkpointing=none", "steps=3", "eval=none",
        "device=cpu", "data.held_out=0",
    ]  # fmt: skip


def main() -> int:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        words = job(folder)
        code, said = run(0, "plan", *words, "format=json", "savings=0")
        assert code == 0, said
        peak = json.JSONDecoder().raw_decode(said[said.index("{") :])[0]["peak_bytes"]
        print(f"planned peak: {peak / 1e9:.3f} GB")
        over, under = int(peak / 1.1), int(peak / 0.89)
        found = {
            "planned 10 % over what is free": run(over, *words, f"out={folder / 'a'}"),
            "the same, refuse=false": run(over, *words, f"out={folder / 'b'}", "refuse=false"),
            "planned 10 % under": run(under, *words, f"out={folder / 'c'}"),
        }
        for name, (code, said) in found.items():
            print(f"{name}: exit code {code}: {said.strip().splitlines()[-1][:160]}")
        codes = [code for code, _ in found.values()]
        memory = folder / "c" / "result.json"
        if memory.is_file():
            print("measured:", json.loads(memory.read_text())["memory"]["measured_peak_bytes"] / 1e9, "GB")
        made = [folder / name / "result.json" for name in "bc"]
        cuts = [json.loads(p.read_text())["recoveries"] if p.is_file() else [] for p in made]
        print("recoveries:", cuts)
        return 0 if codes == [3, 0, 0] and cuts[0] and not cuts[1] else 1


if __name__ == "__main__":
    sys.exit(main())
