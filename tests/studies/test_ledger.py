"""The ledger: what is on it survives a kill; what is torn or damaged does not hurt."""

from __future__ import annotations

from pathlib import Path

from ftrun.studies.ledger import Ledger, read


def test_events_come_back_in_order(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "study" / "ledger.jsonl")
    ledger.add("trial", number=0, values={"rank": "8"})
    ledger.add("end", number=0, status="finished", figures={"loss": float("nan")})
    ledger.close()
    again = Ledger(tmp_path / "study" / "ledger.jsonl")
    assert [e["event"] for e in again.events] == ["trial", "end"]
    assert again.last("end", number=0)["figures"] == {"loss": None}
    assert again.last("end", number=1) is None
    assert again.of("trial")[0]["values"] == {"rank": "8"}


def test_a_torn_last_line_is_cut_off_and_a_damaged_one_left_out(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b'{"event": "trial", "number": 0}\nnot json\n[1]\n{"event": "end", "num')
    said: list[str] = []
    ledger = Ledger(path, said.append)
    assert [e["event"] for e in ledger.events] == ["trial"]
    assert len(said) == 2
    assert "line 2" in said[0]
    ledger.add("end", number=0)
    ledger.close()
    assert [e["event"] for e in read(path)] == ["trial", "end"]
