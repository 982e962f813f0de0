"""What each choice of conf/optim does: it learns, it takes its options, it says what it cannot do here."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import warnings

import pytest
import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode

from ftrun.errors import UserError
from ftrun.memory import cpu_kernels
from ftrun.memory.events import allocations
from ftrun.memory.track import Instant, Tracker
from ftrun.optim.paging import paged_bytes
from tests.optim.choices import CHOICES, ROOT, build, options

STEPS = 60
# Lion's steps have the rate's own size, so it takes a smaller one; SGD's have the gradient's
RATES = {"lion": 3e-3, "paged_lion_8bit": 3e-3, "sgd": 3.0}


def fit(name: str, **changes: object) -> tuple[float, float]:
    """Loss of a small regression before and after 60 steps. Two matrices of 8,192 elements: 8-bit where asked."""
    g = torch.Generator().manual_seed(0)
    x, target = torch.randn(256, 64, generator=g), torch.randn(64, 128, generator=g) / 8
    first, second = (torch.nn.Parameter(torch.randn(s, generator=g) / 10) for s in ((64, 128), (128, 128)))
    optimizer = build(name, [first, second], lr=RATES.get(name, 1e-2), decay=0.0, **changes)
    losses = []
    for _ in range(STEPS):
        loss = ((x @ first @ second - x @ target) ** 2).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses[0], losses[-1]


@pytest.mark.parametrize("name", CHOICES)
def test_it_learns(name: str) -> None:
    before, after = fit(name)
    assert after < before / 2


@pytest.mark.parametrize(("small", "large"), [("adamw_8bit", "adamw"), ("paged_lion_8bit", "lion")])
def test_8_bits_learn_as_32_do(small: str, large: str) -> None:
    before, reference = fit(large)
    _, quantised = fit(small)
    assert (quantised - reference) / (before - reference) < 0.02


@pytest.mark.parametrize("engine", ["foreach", "loop"])
def test_adamw_engines_agree(engine: str) -> None:
    assert fit("adamw", engine=engine)[1] == pytest.approx(fit("adamw")[1], rel=1e-4)


def test_bitsandbytes_adamw_is_torch_adamw() -> None:
    assert fit("paged_adamw_32bit")[1] == pytest.approx(fit("adamw")[1], rel=1e-4)


@pytest.mark.parametrize("name", CHOICES)
def test_groups_keep_their_own_rate_and_decay(name: str) -> None:
    params = [torch.nn.Parameter(torch.ones(8, 8)) for _ in range(4)]
    optimizer = build(name, params, lr=0.01)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.01, 0.1), (0.005, 0.0)]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert params[0].mean().item() == pytest.approx(1 - 0.01 * 0.1, abs=1e-5)
    assert torch.equal(params[3], torch.ones(8, 8))


@pytest.mark.parametrize("name", CHOICES)
def test_only_paged_ones_say_that_nothing_pages(name: str) -> None:
    _, made = options(name)
    expected = [f"{name}: paging needs CUDA; here the state stays in ordinary memory"] if "paged" in name else []
    assert made.notes("cpu") == expected
    assert made.notes("cuda") == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(name)


@pytest.mark.parametrize("name", CHOICES)
def test_fake_and_real_states_are_alike(name: str) -> None:
    """The plan follows an optimiser on fake tensors: the same tensors must come of it as of a real step."""

    def state(device: str) -> list[list[tuple[str, object]]]:
        params = [torch.nn.Parameter(torch.ones(s)) for s in ((400, 256), (96, 64), (17, 16))]
        optimizer = build(name, params, device=device)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        kept = [{k: v for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor)} for p in params]
        seen.append(paged_bytes(optimizer))
        return [sorted((k, (tuple(v.shape), v.dtype)) for k, v in entry.items()) for entry in kept]

    seen: list[int] = []
    real = state("cpu")
    # a GPU's plan runs on fake CPU tensors: device is what the job says, not what a tensor says
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert state("cuda") == real
    wide = 400 * 256  # the one tensor that is large enough to page
    paged = {"paged_adamw_8bit": 2 * wide, "paged_adamw_32bit": 8 * wide, "paged_lion_8bit": wide}
    assert seen == [0, paged.get(name, 0)]


@pytest.mark.parametrize("name", [c for c in CHOICES if c != "adafactor"])
def test_a_step_on_fake_tensors_takes_what_a_real_one_does(name: str) -> None:
    """bitsandbytes' updates on a CPU take temporaries of their parameter's size, and its stand-ins none."""

    def ready() -> tuple[torch.optim.Optimizer, list[torch.nn.Parameter]]:
        params = [torch.nn.Parameter(torch.ones(s)) for s in ((400, 256), (96, 64), (17, 16))]
        optimizer = build(name, params)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        return optimizer, params

    optimizer, _ = ready()
    with allocations() as seen:
        optimizer.step()
    with FakeTensorMode():
        optimizer, params = ready()
        tracker = Tracker(transient=cpu_kernels.transient)
        with tracker:
            held = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
            tracker.mark([*params, *(p.grad for p in params if p.grad is not None), *held], "other")
            tracker.begin(Instant("step"))
            optimizer.step()
        planned = tracker.segments[-1].peak.less(tracker.segments[-1].start).total
    assert abs(planned - seen.peak) <= 64  # scalars


@pytest.mark.parametrize("name", CHOICES)
def test_the_yaml_names_every_option(name: str) -> None:
    values = yaml.safe_load((ROOT / "conf" / "optim" / f"{name}.yaml").read_text())
    _, made = options(name)
    assert set(values) - {"kind"} == {f.name for f in dataclasses.fields(made)}


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("adamw", {"betas": [0.9]}, r"optim\.betas"),
        ("adamw", {"betas": [0.9, 1.0]}, r"optim\.betas.*less than 1"),
        ("adamw", {"clip": 0}, r"optim\.clip"),
        ("adamw", {"schedule": "cosin"}, "Did you mean 'cosine'"),
        ("adamw_8bit", {"bits": 4}, r"optim\.bits=4: expected one of 8, 32"),
        ("sgd", {"momentum": 0.0, "nesterov": True}, r"optim\.nesterov"),
        ("lion", {"eps": 1e-8}, "'eps' is unknown"),
    ],
)
def test_mistakes_name_their_key(name: str, changes: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        options(name, **changes)


def test_options_are_read_without_torch() -> None:
    code = (
        "import sys; from pathlib import Path; from ftrun.schema import read_options\n"
        "for path in Path('ftrun/optim').glob('[a-z]*.py'):\n"
        "    if 'class Options' in path.read_text(): read_options(path)\n"
        "assert not {'torch', 'bitsandbytes', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
