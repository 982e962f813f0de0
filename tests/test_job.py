"""The job: typed, frozen, whole; it knows the groups and no part by name."""

from __future__ import annotations

import dataclasses

import pytest

from ftrun.compose import compose
from ftrun.errors import UserError
from ftrun.job import ROOMS, Job, find_variant, make_job


def test_a_job_is_frozen_and_holds_every_group() -> None:
    job = compose(["method=qlora"])
    assert set(job.choices) == set(ROOMS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        job.seed = 3  # type: ignore[misc]
    assert job.as_dict()["choices"]["quant"] == "nf4"
    assert job.as_dict()["rank"] == 16


def test_a_part_loads_its_module_and_hands_over_its_own_options() -> None:
    part = compose(["optim=sgd", "optim.momentum=0.5"]).optim
    typed = part.typed()
    assert part.load().__name__ == part.module == "ftrun.optim.sgd"
    assert type(typed) is part.load().Options
    assert typed.momentum == 0.5


@pytest.mark.parametrize(
    ("typed", "interval"),
    [
        ("50", (50, None)),
        ("10min", (None, 600.0)),
        ("1.5h", (None, 5400.0)),
        ("30s", (None, 30.0)),
        ("null", (None, None)),
    ],
)
def test_save_every(typed: str, interval: tuple[int | None, float | None]) -> None:
    assert compose([f"save_every={typed}"]).save_interval() == interval


def test_variants_are_found_by_kind() -> None:
    module, path = find_variant("method", "lora")
    assert (module, path.name) == ("ftrun.methods.lora", "lora.py")
    assert find_variant("model", "")[0] == "ftrun.models.options"
    for kind in ("lroa", "", "../job", "base", "lora.py"):
        with pytest.raises((UserError, KeyError)):
            make_job({"method": {"kind": kind}}, dict.fromkeys(ROOMS, "x"))


def test_what_the_machine_lacks_is_said_before_the_start(tmp_path: object) -> None:
    job = compose(["data=jsonl", "data.path=READMEE.md"])
    with pytest.raises(UserError, match=r"data\.path=READMEE\.md.*Did you mean"):
        job.check()
    compose(["data=text", "data.path=README.md"]).check()


def test_every_key_of_the_job_has_a_line() -> None:
    for field in dataclasses.fields(Job):
        assert field.name in ROOMS or field.name == "tree" or field.metadata["doc"]
