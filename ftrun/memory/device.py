"""The device that a job is planned for and runs on: what it is, and how much memory there is on it."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from ftrun.errors import UserError
from ftrun.memory.sizes import parse_size
from ftrun.schema import option


@dataclass(frozen=True)
class Options:
    type: str = option("auto", "auto (a CUDA device where there is one, else the CPU)", choices=("auto", "cpu", "cuda"))
    name: str | None = option(None, "what it is called in messages; null = as the machine calls it")
    memory: int | str | None = option(None, "bytes, or as 24GB (1e9 each) or 24GiB (2^30 each); null = as found")
    bf16: bool | None = option(None, "whether it computes in bfloat16; null = as found")
    capability: float | None = option(None, "CUDA compute capability, 8.9; null = as found", gt=0)
    tflops: float | None = option(
        None, "1e12 operations a second in 16-bit products, by its maker; null = unknown", gt=0
    )
    bandwidth: float | None = option(None, "1e9 bytes of its memory a second, by its maker; null = unknown", gt=0)

    def __post_init__(self) -> None:
        if self.memory is not None:
            parse_size(self.memory, "device.memory")


# of the free memory, what can be planned for: the rest is for what no plan sees (fragments, other processes)
SHARE = {"cpu": 0.9, "cuda": 0.97}


@dataclass(frozen=True)
class Device:
    """type: "cpu" or "cuda". Bytes: all there is, and what is free now. present: whether this machine has it."""

    type: str
    name: str
    total_bytes: int
    free_bytes: int
    bf16: bool
    present: bool
    capability: tuple[int, int] = (0, 0)  # of a CUDA device

    def shared_by(self, processes: int) -> Device:
        """What one of so many processes has of it: an equal part of the host's memory; each has a card of its own."""
        if self.type != "cpu" or processes == 1:
            return self
        return replace(self, free_bytes=self.free_bytes // processes)

    @property
    def context_bytes(self) -> int:
        """What CUDA itself takes on the card, before the first tensor."""
        if self.type == "cpu":
            return 0
        from ftrun.memory.cuda import context

        return context(self.capability)

    @property
    def usable_bytes(self) -> int:
        """What a job's tensors may take at their peak."""
        context = 0 if self.present else self.context_bytes
        return int(SHARE[self.type] * max(0, self.free_bytes - context))


def resolve(options: Options, absent: bool = False) -> Device:
    """The device of the options, as this machine has it, or as the options describe it where it has not.

    absent: a card to think of, whatever this machine has. A size in the options is a ceiling on a device that is
    present. Raises UserError where a CUDA device is asked for without a size, and there is none.
    """
    asked = None if options.memory is None else parse_size(options.memory, "device.memory")
    if options.type == "cpu":
        return _cpu(options, asked)
    import torch

    if torch.cuda.is_available() and not absent:
        return _cuda(options, asked)
    if options.type == "auto":
        return _cpu(options, asked)
    if asked is None:
        raise UserError(
            "device=cuda: expected a CUDA device, or device.memory=24GB to plan for one, found neither; "
            "device=auto takes what there is"
        )
    return Device("cuda", options.name or "CUDA", asked, asked, options.bf16 is not False, False, _split(options))


def _cuda(options: Options, asked: int | None) -> Device:
    import torch

    free, total = torch.cuda.mem_get_info()
    ceiling = asked or total
    name = options.name or torch.cuda.get_device_name()
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if options.bf16 is None else options.bf16
    # a device that is larger than this machine's can only be planned for
    capability = _split(options) if options.capability else torch.cuda.get_device_capability()
    room = min(free, ceiling) if ceiling <= total else ceiling
    return Device("cuda", name, ceiling, room, bf16, ceiling <= total, capability)


def _split(options: Options) -> tuple[int, int]:
    """8.9 -> (8, 9); an Ampere card where nothing is said."""
    major, _, minor = str(options.capability or 8.0).partition(".")
    return int(major), int(minor)


def _cpu(options: Options, asked: int | None) -> Device:
    from ftrun.memory.host import memory

    total, free = memory()
    ceiling = asked or total
    name = options.name or _processor()
    return Device("cpu", name, ceiling, min(free, ceiling), options.bf16 is not False, ceiling <= total)


@functools.cache
def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else "CPU"
