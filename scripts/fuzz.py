"""Inputs that nobody would type, by the thousand: each ends in a result or in one message, and runs nothing.

    python scripts/fuzz.py [inputs, 2000 by default] [seed, 0] [surface ...]

Surfaces: overrides, job files, data files (jsonl, json, csv, parquet), adapter folders, checkpoints, bases of
safetensors and GGUF files, and finished runs by the verbs that open one. A sound input is changed at random (bytes
turned, cut, doubled, numbers made huge, values of JSON made something else) and read by the product's own code. Wrong
are: any exception but those that a user is told of, a message of many lines, an exit code beside 0, 2 and 3, more than
20 s, a run's folder that is left behind, a file written outside the run's folder and the cache, a process started, a
pickle opened. Exit code 1 where something is wrong; each such input is printed with its number, and
`python scripts/fuzz.py 1 SEED SURFACE` is the first of a seed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from ftrun.errors import RunFailed, UserError  # noqa: E402
from tests.jobs import overrides, tiny_base, write_rows  # noqa: E402

SECONDS = 20
_FEW = ("eval=all", "eval.retention=0", "eval.exact=none", "eval.rows=2")  # of what ftrun eval measures
_KEYS = (
    "rank", "lr", "steps", "batch", "micro_batch", "seq_len", "seed", "layers", "targets", "checkpointing",
    "epochs",
)  # fmt: skip
_KEYS += ("method", "quant", "optim", "data", "eval", "save_every", "save_last", "skip_nonfinite", "dropout", "device")
_KEYS += ("model.dtype", "optim.clip", "data.held_out", "data.template", "eval.every", "method.init", "name", "prompt")
_WORDS = (
    "", "null", "-1", "0", "1e999", "nan", "9" * 40, "[", "{a:", "'", '"', "a,b", "../../x", "~", "\\",
    "${oc.env:HOME}",
)  # fmt: skip
_WORDS += (
    "${rank}", "${lr}${", "[1,2]", "{a: 1}", "!!python/object/apply:os.system [id]", "re:(", "last:0", "0-99",
    "\u202e",
)  # fmt: skip
_WORDS += (
    "lora", "qlora", "nf4", "*", "**", "true", "1.5", "0x10", "é" * 50, "$(touch x)", "`touch x`", "a=b", "@", "+",
    "int8",
)  # fmt: skip


class Guard:
    """What may not happen while an input is read: a process, a pickle, a file written outside of some folders."""

    def __init__(self, allowed: Sequence[Path]) -> None:
        self.allowed = [str(p) for p in allowed]
        self.on, self.seen = False, list[str]()
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pickle.find_class"):
            self.seen.append(f"{event} {args[:2]!r}"[:200])
        elif event == "open" and isinstance(args[0], str | bytes):
            mode, flags = args[1], args[2]
            writes = set(mode or "") & set("wax+") if isinstance(mode, str) else flags & (os.O_WRONLY | os.O_RDWR)
            self._path(event, args[0], bool(writes))
        elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate"):
            relative = isinstance(args[-1], int) and args[-1] >= 0  # to an open folder, as rmtree does
            self._path(event, args[0], isinstance(args[0], str | bytes | os.PathLike) and not relative)

    def _path(self, event: str, path: Any, writes: bool) -> None:
        if writes and not os.path.abspath(os.fsdecode(path)).startswith((*self.allowed, "/dev/", "/proc/")):
            self.seen.append(f"{event} {path!r}")


def turned(dice: random.Random, content: bytes) -> bytes:
    """The bytes with one to five changes."""
    made = bytearray(content)
    for _ in range(dice.randint(1, 5)):
        at = dice.randrange(len(made) + 1)
        kind = dice.randrange(7)
        if kind == 0 and at < len(made):
            made[at] ^= 1 << dice.randrange(8)
        elif kind == 1:
            del made[at:]
        elif kind == 2:
            made[at:at] = dice.randbytes(dice.randint(1, 20))
        elif kind == 3:
            made[at : at + 8] = struct.pack("<Q", dice.choice([0, 1, 2**31, 2**32, 2**63, 2**64 - 1]))
        elif kind == 4:
            made[at:at] = made[at : at + dice.randint(1, 200)]
        elif kind == 5:
            made[at:at] = dice.choice(
                [b"\x00", b"\xff\xfe", b"[" * 3000, b'{"a":' * 2000, b"\n\n", b'"', b"\r", b"1e999"]
            )
        else:
            del made[at : at + dice.randint(1, 50)]
    return bytes(made)


def otherwise(dice: random.Random, value: Any) -> Any:
    """A JSON value with one of its values made another."""
    strange = [None, -1, 0, 10**30, 1e308, "", "x", [], {}, [[]], {"a": None}, True, "../../../x", "\ud800"]
    if isinstance(value, dict) and value and dice.random() < 0.85:
        key = dice.choice(sorted(value))
        if dice.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: otherwise(dice, value[key])}
    if isinstance(value, list) and value and dice.random() < 0.85:
        at = dice.randrange(len(value))
        return [*value[:at], otherwise(dice, value[at]), *value[at + 1 :]]
    return dice.choice(strange)


class Fuzz:
    """A folder with sound inputs, and for each surface a function that changes one and reads it."""

    def __init__(self, folder: Path, cache: Path) -> None:
        import torch  # noqa: F401

        self.folder, self.cache = folder, cache
        self.out = folder / "out"
        self.base = tiny_base(folder / "llama")
        self.rows = write_rows(folder / "rows.jsonl")
        self.words = overrides(self.base, self.rows, "eval=none")
        self._command("train", *self.words, "method=lora", "rank=4", "steps=1", f"out={folder / 'sound'}")
        self.sound = folder / "sound"
        self._command("eval", f"run={self.sound}", *_FEW)
        self._files()
        self.guard = Guard([folder, cache, Path(tempfile.gettempdir()) / "ftrun-"])

    def _files(self) -> None:
        import numpy as np
        import pyarrow
        import pyarrow.parquet
        from gguf import GGUFWriter

        found = [json.loads(line) for line in self.rows.read_text().splitlines()]
        (self.folder / "rows.json").write_text(json.dumps(found))
        lines = ["question,answer", *(f'"{row["question"]}","{row["answer"]}"' for row in found)]
        (self.folder / "rows.csv").write_text("\n".join(lines))
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(found), self.folder / "rows.parquet")
        writer = GGUFWriter(str(self.folder / "tiny.gguf"), "llama")
        writer.add_block_count(2)
        writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
        writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    @property
    def surfaces(self) -> dict[str, Callable[[random.Random], str]]:
        """Each changes an input and reads it; returns the input in words. Raises what the product raised."""
        return {
            "overrides": self.overrides, "job": self.job, "data": self.data, "adapter": self.adapter,
            "checkpoint": self.checkpoint, "safetensors": self.safetensors, "gguf": self.gguf, "run": self.run,
        }  # fmt: skip

    def _command(self, *words: str) -> None:
        from ftrun import cli

        said, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
            code = cli.main(words)
        if code == 2 and "Traceback" not in errors.getvalue():
            told = [line for line in errors.getvalue().splitlines() if line.startswith("ftrun: ")]
            assert len(told) == 1, f"{len(told)} messages: {errors.getvalue()[-300:]}"
        else:
            assert code in (0, 3), f"exit code {code}: {errors.getvalue()[-300:]}"

    def overrides(self, dice: random.Random) -> str:
        more = []
        for _ in range(dice.randint(1, 3)):
            key = dice.choice(_KEYS) if dice.random() < 0.9 else dice.choice(_WORDS)
            word = f"{key}={dice.choice(_WORDS)}" if dice.random() < 0.95 else dice.choice(_WORDS)
            more.append(dice.choice(["", "", "", "+", "++", "~"]) + word)
        self._command("data", *self.words, *more)
        return repr(more)

    def job(self, dice: random.Random) -> str:
        path, content = self.folder / "job.yaml", (self.sound / "job.yaml").read_bytes()
        if dice.random() < 0.4:
            import yaml

            path.write_text(json.dumps(otherwise(dice, yaml.safe_load(content))))
        elif dice.random() < 0.2:
            line = b"rank: !!python/object/apply:os.system ['touch %s/ran']" % os.fsencode(self.folder)
            path.write_bytes(re.sub(rb"^rank:.*$", line, content, flags=re.MULTILINE))
        else:
            path.write_bytes(turned(dice, content))
        self._command("data", f"job={path}")
        return str(path)

    def data(self, dice: random.Random) -> str:
        kind = dice.choice(["jsonl", "json", "csv", "parquet"])
        content, path = (self.folder / f"rows.{kind}").read_bytes(), self.folder / f"fuzzed.{kind}"
        if kind in ("jsonl", "json") and dice.random() < 0.4:
            rows = otherwise(dice, json.loads((self.folder / "rows.json").read_text()))
            lines = [json.dumps(row) for row in rows] if isinstance(rows, list) else [json.dumps(rows)]
            path.write_text(json.dumps(rows) if kind == "json" else "\n".join(lines))
        else:
            path.write_bytes(turned(dice, content))
        words = overrides(self.base, path, "eval=none", f"data={kind}")
        bad = dice.choice(["error", "skip"])
        self._command("data", *words, f"data.bad_rows={bad}")
        return kind

    def adapter(self, dice: random.Random) -> str:
        name = self._changed(dice, self.sound / "adapter", "fuzzed-adapter")
        words = ("method=lora", "rank=4", "steps=1", f"method.from={self.folder / 'fuzzed-adapter'}", f"out={self.out}")
        self._command("train", *self.words, *words, "allow_drift=true")
        return name

    def checkpoint(self, dice: random.Random) -> str:
        from ftrun.train.checkpoint import commit, latest

        checkpoints = self.folder / "checkpoints"
        shutil.rmtree(checkpoints, ignore_errors=True)
        name = self._changed(dice, self.sound / "checkpoints/step-1", "checkpoints/step-1")
        if dice.random() < 0.7:  # as if it had been saved so
            path = checkpoints / "step-1/state.json"
            with contextlib.suppress(ValueError, AttributeError, OSError, TypeError):
                state = json.loads(path.read_text())
                for key in dice.choice([("files", "format"), ("files",)]):  # of before there were markers, or of today
                    state.pop(key, None)
                path.write_text(json.dumps(state))
                commit(path.parent) if "format" in state else (path.parent / "commit.json").unlink()
        if dice.random() < 0.8:
            latest(checkpoints, lambda text: None)
            return name
        shutil.rmtree(self.out, ignore_errors=True)
        shutil.copytree(self.sound, self.out, ignore=shutil.ignore_patterns("checkpoints", "result.json", ".lock"))
        shutil.copytree(checkpoints, self.out / "checkpoints")
        try:
            self._command("train", *self.words, "method=lora", "rank=4", "steps=1", f"out={self.out}")
        finally:
            shutil.rmtree(self.out)
        return name

    def safetensors(self, dice: random.Random) -> str:
        name = self._changed(dice, self.base, "fuzzed-base", ("model.safetensors", "config.json", "tokenizer.json"))
        words = overrides(self.folder / "fuzzed-base", self.rows, "eval=none", "method=lora", "rank=4", "steps=1")
        self._command("train", *words, f"out={self.out}")
        return name

    def gguf(self, dice: random.Random) -> str:
        from ftrun.models.sources.gguf import GGUF

        path = self.folder / "fuzzed.gguf"
        path.write_bytes(turned(dice, (self.folder / "tiny.gguf").read_bytes()))
        for _ in GGUF(path).tensors():
            pass
        return path.name

    def run(self, dice: random.Random) -> str:
        run, merged = self.folder / "fuzzed-run", self.folder / "merged"
        for folder in (run, merged):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.sound, run, ignore=shutil.ignore_patterns("checkpoints", ".lock", "log.txt"))
        learnt = ("job.yaml", *(f"adapter/{p.name}" for p in sorted((run / "adapter").iterdir())))
        verbs = {
            "check": ((f"run={run}",), learnt),
            "generate": ((f"run={run}", "prompt=a", "max_new_tokens=2"), ("result.json", *learnt)),
            "eval": ((f"run={run}", *_FEW), ("result.json", "eval.json", *learnt)),
            "merge": ((f"run={run}", f"out={merged}", "rows=2"), ("result.json", *learnt)),
            "push": ((f"run={run}", "repo=me/mine", "dry=true"), ("result.json", "result.json", *learnt)),
            "report": ((str(run),), ("result.json", "result.json", "metrics.jsonl", "evals.jsonl", "job.yaml")),
        }
        verb = dice.choice(sorted(verbs))
        words, files = verbs[verb]
        path = run / dice.choice(files)
        self._change(dice, path)
        self._command(verb, *words)
        assert verb != "merge" or merged.exists() == (merged / "merge.json").exists(), "a half-written model"
        return f"{verb} {path.name}"

    def _changed(self, dice: random.Random, source: Path, to: str, of: Sequence[str] = ()) -> str:
        """A copy of a folder with one file changed, its header most of all; returns that file's name."""
        target = self.folder / to
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
        path = dice.choice(sorted(p for p in target.iterdir() if p.is_file() and (not of or p.name in of)))
        self._change(dice, path)
        return path.name

    def _change(self, dice: random.Random, path: Path) -> None:
        content = path.read_bytes()
        if path.suffix == ".json" and dice.random() < 0.6:
            path.write_text(json.dumps(otherwise(dice, json.loads(content))))
        elif path.suffix == ".jsonl" and dice.random() < 0.6:
            rows = otherwise(dice, [json.loads(line) for line in content.splitlines()])
            path.write_text(
                "".join(json.dumps(row) + "\n" for row in rows) if isinstance(rows, list) else json.dumps(rows)
            )
        elif path.suffix == ".yaml" and dice.random() < 0.6:
            import yaml

            path.write_text(json.dumps(otherwise(dice, yaml.safe_load(content))))
        elif path.suffix == ".safetensors" and dice.random() < 0.7:
            size = struct.unpack("<Q", content[:8])[0]
            header = json.dumps(otherwise(dice, json.loads(content[8 : 8 + size]))).encode()
            header += b" " * (-len(header) % 8)
            path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + size :])
        else:
            path.write_bytes(turned(dice, content))

    def one(self, surface: str, seed: str) -> str | None:
        """What is wrong with how an input was taken; None where nothing is."""
        dice, started = random.Random(seed), time.monotonic()
        self.guard.seen, self.guard.on = [], True
        try:
            with _limited(SECONDS):
                self.surfaces[surface](dice)
        except (UserError, RunFailed) as error:
            if not str(error).strip():
                return "an empty message"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            at = traceback.extract_tb(error.__traceback__)[-1]
            return f"{type(error).__name__}: {str(error)[:200]} ({Path(at.filename).name}:{at.lineno})"
        finally:
            self.guard.on = False
        if self.guard.seen:
            return f"not allowed: {self.guard.seen[:3]}"
        if (self.folder / "ran").exists():
            return "it ran what a file contained"
        if self.out.exists():
            half = not (self.out / "result.json").exists()
            shutil.rmtree(self.out)
            if half:
                return "a run's folder was left half-made"
        return None if time.monotonic() - started < SECONDS else "too long"


@contextlib.contextmanager
def _limited(seconds: int) -> Iterator[None]:
    def late(number: int, frame: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# of a hundred inputs; those that train take the longest
SHARES = {
    "overrides": 18,
    "job": 18,
    "data": 18,
    "adapter": 5,
    "checkpoint": 13,
    "safetensors": 5,
    "gguf": 13,
    "run": 10,
}


def sequence(count: int, surfaces: Sequence[str] = tuple(SHARES)) -> list[str]:
    """The surfaces of so many inputs."""
    every = [name for name in surfaces for _ in range(SHARES[name])]
    random.Random(0).shuffle(every)
    return [every[i % len(every)] for i in range(count)]


def main(arguments: list[str]) -> int:
    count, seed = (int(x) for x in (arguments + ["2000", "0"][len(arguments) :])[:2])
    from ftrun.runs import cache_dir

    wrong = 0
    with tempfile.TemporaryDirectory() as made:
        fuzz, chosen = Fuzz(Path(made), cache_dir()), sequence(count, arguments[2:] or tuple(SHARES))
        started = time.monotonic()
        for number, surface in enumerate(chosen):
            found = fuzz.one(surface, f"{seed} {number}")
            if found:
                wrong += 1
                print(f"{surface} {number}: {found}", flush=True)
    print(f"{count} inputs in {time.monotonic() - started:.0f} s: {wrong} were not taken as they should be")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
