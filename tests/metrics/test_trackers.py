"""Real trackers, read back; and what a tracker that is slow, broken or missing does to a run: nothing."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import os
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from wandb.proto import wandb_internal_pb2

from ftrun import schema
from ftrun.errors import UserError
from ftrun.metrics.background import Background
from ftrun.metrics.secrets import flat
from tests.metrics.records import JOB, RESULT, evaluation, step

ROOT = Path(__file__).parents[2]
CHOICES = sorted(p.stem for p in (ROOT / "conf" / "log").glob("*.yaml"))
SECRET = "hf_abcdefghijklmnopqrstuvwxyz"


def options(name: str, **changes: Any) -> tuple[Any, Any]:
    """The tracker's module and its options, as the product reads them: before the module is imported."""
    values = yaml.safe_load((ROOT / "conf" / "log" / f"{name}.yaml").read_text())
    kind = values.pop("kind")
    cls = schema.read_options(ROOT / "ftrun" / "metrics" / "trackers" / f"{kind}.py")
    assert set(values) == {f.name for f in dataclasses.fields(cls)}
    return importlib.import_module(f"ftrun.metrics.trackers.{kind}"), schema.build(cls, {**values, **changes}, "log")


def drive(sink: Any, run: Path, steps: int = 20) -> float:
    """Take a run's records through the sink; the longest time that one of them took, in seconds."""
    sink.start({**JOB, "hub_token": SECRET, "note": f"https://me:{SECRET}@host/"}, run)
    sink.evaluation(evaluation(0, loss=3.0))
    longest = 0.0
    for number in range(1, steps + 1):
        begun = time.monotonic()
        sink.step(step(number, loss=float(number)))
        longest = max(longest, time.monotonic() - begun)
    sink.close(RESULT)
    return longest


def holds_no_secret(run: Path) -> bool:
    return not any(SECRET.encode() in path.read_bytes() for path in run.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", CHOICES)
def test_the_choice_checks_its_package(name: str) -> None:
    _, made = options(name)
    if made.package is None or importlib.util.find_spec(made.package):
        made.check()
    else:
        with pytest.raises(UserError, match=rf"log={name}: the package '{name}' is not installed.*pip install"):
            made.check()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    _, made = options("mlflow")
    with pytest.raises(UserError, match=r"log=mlflow: .* pip install 'ftrun\[mlflow\]'"):
        made.check()


def test_none_is_no_sink() -> None:
    module, made = options("none")
    assert module.sink(made, "r", print) is None


def test_tensorboard_is_read_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    module, made = options("tensorboard", every=5)
    said: list[str] = []
    drive(module.sink(made, "r", said.append), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(n, float(n)) for n in (1, 5, 10, 15, 20)]
    assert [e.value for e in events.Scalars("eval/loss")] == [3.0]
    assert "method.rank: 16" in next((tmp_path / "tensorboard").rglob("hparams.yml")).read_text()
    assert holds_no_secret(tmp_path)
    assert said == []


@pytest.mark.parametrize("agent", [False, True], ids=["alone", "of an agent"])
def test_wandb_offline_ends_and_is_read_back(tmp_path: Path, agent: bool) -> None:
    """In a process of its own, as users have it, with no key and a home of its own; or as `wandb agent` starts it."""
    code = (
        "import sys, time; from pathlib import Path; from tests.metrics.test_trackers import *\n"
        "module, made = options('wandb', group='g', tags=['a'])\n"
        "run = Path(sys.argv[1]); longest = drive(module.sink(made, 'r', print), run)\n"
        "assert longest < 0.5, longest"
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_") and k != "NETRC"}
    kept |= {"WANDB_SWEEP_ID": "sweep1", "WANDB_RUN_ID": "trial1", "WANDB_PROJECT": "theirs"} if agent else {}
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        env={**kept, "HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begun < 20
    assert "wandb: offline (no WANDB_API_KEY" in done.stdout
    assert done.stderr == ""
    files = list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 1
    kinds = records(files[0])
    (run,) = [one.run for one in kinds if one.WhichOneof("record_type") == "run"][:1]
    assert (run.run_group, run.job_type) == ("g", "train")
    assert (run.run_id, run.sweep_id) == (("trial1", "sweep1") if agent else ((tmp_path / "wandb/id").read_text(), ""))
    logged = [history(one) for one in kinds if one.WhichOneof("record_type") == "history"]
    assert [row["train/loss"] for row in logged if "train/loss" in row] == [float(n) for n in range(1, 21)]
    assert holds_no_secret(tmp_path)


def test_a_study_within_an_agent_has_runs_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_RUN_ID", "trial1")
    module, _ = options("wandb")
    places = [tmp_path / "runs" / name for name in ("a", "b")]
    for place in places:
        place.mkdir(parents=True)
    (tmp_path / "study.yaml").touch()
    ids = [module._identity(place) for place in places]
    assert len({*ids, "trial1"}) == 3
    assert ids == [module._identity(place) for place in places]


def test_the_runs_of_one_process_are_kept_apart_at_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It exports where it logs to, which a study's next job must not take for a server that the user names."""
    from accelerate import tracking

    places: list[str] = []

    def set_tracking_uri(uri: str) -> None:
        places.append(uri)
        os.environ["MLFLOW_TRACKING_URI"] = uri

    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(set_tracking_uri=set_tracking_uri))
    monkeypatch.setattr(tracking, "MLflowTracker", lambda *words, **more: None)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    module, made = options("mlflow")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        module.sink(made, name, print)._make(tmp_path / name, print)
    assert [str(tmp_path / name) in place for name, place in zip("ab", places, strict=True)] == [True, True]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://here")
    module.sink(made, "c", print)._make(tmp_path / "a", print)
    assert (len(places), os.environ["MLFLOW_TRACKING_URI"]) == (2, "http://here")


def test_a_study_has_one_trackio_and_a_run_its_own(tmp_path: Path) -> None:
    module, _ = options("trackio")
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "study.yaml").touch()
    runs = [tmp_path / "study" / "runs" / "a", tmp_path / "study" / "runs" / "b", tmp_path / "runs" / "c"]
    places = [tmp_path / "study" / "trackio"] * 2 + [tmp_path / "runs" / "c" / "trackio"]
    assert [module._place(run) for run in runs] == places


def history(record: Any) -> dict[str, Any]:
    """A row as it was logged."""
    return {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}


def records(file: Path) -> list[Any]:
    """What a W&B file holds: protobuf records in LevelDB's log format, 7 bytes of W&B's own before it."""
    data, at, record, found = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32_768 - at % 32_768 < 7:  # a block's last bytes, too few for a header
            at += 32_768 - at % 32_768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(wandb_internal_pb2.Record())
            found[-1].ParseFromString(record)
            record = b""
    return found


def test_wandb_finds_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _ = options("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert module.how()[0] == "offline"
    (tmp_path / ".netrc").write_text("machine wandb.example login user password " + "a" * 40 + "\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert module.has_key("wandb.example")
    assert not module.has_key("api.wandb.ai")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there
    assert module.how() == ("offline", "127.0.0.1 does not answer")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert module.how()[0] == "disabled"


class Fake:
    """A tracker whose every call may be held back or fail."""

    def __init__(self, gate: threading.Event | None = None, fails: str = "") -> None:
        self.gate, self.fails, self.rows, self.ended = gate, fails, [], False

    def _do(self, what: str) -> None:
        if self.fails == what:
            raise RuntimeError(f"no {what}\ntoday")

    def start(self) -> None:
        self._do("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, Any], step: int) -> None:
        if self.gate:
            self.gate.wait(10)
        self._do("log")
        self.rows.append(step)

    def finish(self) -> None:
        self._do("finish")
        self.ended = True


def test_a_slow_tracker_loses_records_and_not_time(tmp_path: Path) -> None:
    gate, said = threading.Event(), []
    fake = Fake(gate)
    sink = Background("slow", lambda run, tell: fake, said.append, room=5, patience=0.3)
    begun = time.monotonic()
    drive(sink, tmp_path, steps=100)
    assert time.monotonic() - begun < 2
    assert len(said) == 2
    assert "still not done after 0.3 s" in said[0] or "still not done after 0.1 s" in said[0]
    lost = int(said[1].split()[1])
    assert "records were dropped" in said[1]
    assert 94 <= lost <= 96  # 101 records: one in hand, five waiting
    gate.set()


@pytest.mark.parametrize(
    ("fails", "line"),
    [
        ("start", "x: could not start, the run goes on without it: RuntimeError: no start today"),
        ("log", "x: a record was not taken: RuntimeError: no log today"),
        ("finish", "x: did not end well: RuntimeError: no finish today"),
    ],
)
def test_a_broken_tracker_is_one_line(tmp_path: Path, fails: str, line: str) -> None:
    said: list[str] = []
    drive(Background("x", lambda run, tell: Fake(fails=fails), said.append), tmp_path)
    assert said == [line]


def test_a_good_tracker_gets_everything_in_order(tmp_path: Path) -> None:
    fake = Fake()
    drive(Background("x", lambda run, tell: fake, print), tmp_path, steps=50)
    assert fake.rows == list(range(51))
    assert fake.ended
    assert fake.config["method.rank"] == 16
    assert SECRET not in str(fake.config)


def test_secrets_are_hidden_and_the_rest_is_not() -> None:
    job = {"a": {"hub_token": "x", "tokens": 5, "password": "x", "tokenizer": "t"}, "url": "https://u:p@h/d", "n": None}
    assert flat(job) == {
        "a.hub_token": "***",
        "a.tokens": 5,
        "a.password": "***",
        "a.tokenizer": "t",
        "url": "https://***@h/d",
    }
