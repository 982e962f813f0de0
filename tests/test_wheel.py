"""Installed from a wheel, ftrun works from any directory: conf/ and recipes/ travel with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent


def run(*command: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **env}, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ftrun installed from its wheel, and nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "-qq", "--disable-pip-version-check")
    built = run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT), cwd=folder)
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("ftrun-*.whl")
    target = folder / "site"
    put = run(*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel), cwd=folder)
    assert put.returncode == 0, put.stderr
    return target


def test_conf_and_recipes_travel(site: Path) -> None:
    for name in ("conf", "recipes"):
        ours = {p.relative_to(ROOT / name) for p in (ROOT / name).rglob("*.yaml")}
        theirs = {p.relative_to(site / "ftrun" / name) for p in (site / "ftrun" / name).rglob("*.yaml")}
        assert ours == theirs
    assert not (site / "tests").exists()


def test_the_kernels_sources_travel(site: Path) -> None:
    ours, theirs = ({p.name for p in (root / "ftrun/kernels/native").iterdir()} for root in (ROOT, site))
    assert ours == theirs
    assert {"linear.cpp", "attention.cpp", "tiles.h"} <= ours


def test_the_style_of_a_study_page_travels(site: Path) -> None:
    name = "ftrun/report/study_page.css"
    assert (site / name).read_text(encoding="utf-8") == (ROOT / name).read_text(encoding="utf-8")


def test_it_works_from_any_directory(site: Path, tmp_path: Path) -> None:
    def ftrun(*typed: str) -> subprocess.CompletedProcess[str]:
        return run(sys.executable, "-m", "ftrun", *typed, cwd=tmp_path, PYTHONPATH=str(site))

    where = run(sys.executable, "-c", "import ftrun; print(ftrun.__file__)", cwd=tmp_path, PYTHONPATH=str(site))
    assert where.stdout.startswith(str(site))
    assert "method=" in ftrun("--help").stdout
    assert "Options of this verb" in ftrun("data", "--help").stdout
    done = ftrun("recipe=lora-plus", "rank=8", "--cfg", "job")
    assert done.returncode == 0, done.stderr
    tree = yaml.safe_load(done.stdout)
    assert (tree["rank"], tree["optim"]["lora_plus"]) == (8, 16)
    assert ftrun("--version").stdout.startswith("ftrun ")
    assert "Did you mean 'method'" in ftrun("metod=lora").stderr
    assert list(tmp_path.iterdir()) == []
