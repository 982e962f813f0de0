"""Training steps of a peer's job on fake tensors, followed by ftrun's own tracker."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ftrun.memory.cuda import CudaOps, context, transient, workspaces
from ftrun.memory.pool import CachingAllocator
from ftrun.memory.track import Instant, Tracker
from peers import experts, fake, fused, fused_lora

TRAINER, PLAIN = "trainer", "plain"


@dataclass(frozen=True)
class Job:
    """A job as its peer ran it. Everything that decides memory is here, and nothing is left to a default."""

    config: dict[str, Any]
    batch: int
    tokens: int
    method: str = "lora"  # full, lora, qlora
    rank: int = 16
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    dropout: float = 0.0
    dtype: torch.dtype = torch.bfloat16
    nested: bool = True  # double quantisation
    upcast: str = ""  # what preparation for k-bit training casts to float32: all, norms or nothing
    warm: bool = False  # the weights' bytes are taken at once and given back before loading (transformers 4.50 on)
    adapters: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    checkpointing: bool = True
    reentrant: bool = True  # the Trainer's own default: a layer computed again holds its output through its backward
    attention: str = "eager"
    loss: Callable[..., torch.Tensor] | None = None
    fused: str = ""  # fms-acceleration's kernels: norms and rotary embeddings, and "liger" for head and loss at once
    float_logits: bool = False  # the model's own outputs are float32 (transformers before 4.46)
    loop: str = TRAINER
    clip: bool = True  # gradients are clipped by their norm
    # what lives until the next step's outputs are there: "logits", with each layer's keys and values "cache", nothing
    outputs_held: str = ""
    capability: tuple[int, int] = (8, 0)
    memory: int = 85_094_000_000  # bytes of the card


@dataclass(frozen=True)
class Figures:
    """What the step of one job takes, in bytes."""

    allocated: int
    reserved: int
    process: int  # as nvidia-smi sees it
    label: str
    by_role: dict[str, int]


def measure(job: Job, quick: bool = False) -> Figures:
    """The peak over the second step, as torch.cuda.max_memory_allocated and _reserved would have it.

    quick: the optimiser's state is made without a first step; what the allocator has cached by then differs.
    """
    model = _build(job)
    tracker = Tracker(512, transient=transient, pool=CachingAllocator(job.memory - context(job.capability)))
    with FakeTensorMode(allow_non_fake_inputs=True), tracker, CudaOps(job.capability):
        _load(model, job, tracker)
        loop = Loop(model, job, tracker)
        if quick:
            loop.make_state()
        else:
            loop.step()
        tracker.restart()
        loop.step()
    assert tracker.pool is not None
    reserved = tracker.pool.peak_reserved
    process = reserved + context(job.capability)
    return Figures(tracker.peak.peak.total, reserved, process, tracker.peak.instant.name, tracker.peak.peak.by_role)


def _build(job: Job) -> Any:
    model = fake.skeleton(job.config, job.dtype, job.attention)
    if job.config["model_type"] == "mixtral":
        experts.replace(model, job.dtype)
    if job.method == "qlora":
        fake.quantise(model, job.nested, job.dtype)
    if job.method != "full":
        model = fake.adapt(model, job.rank, list(job.targets), job.dropout, job.adapters)
    return model


def _load(model: nn.Module, job: Job, tracker: Tracker) -> None:
    with tracker.role("weights"):
        if job.method == "qlora":
            fake.load_quantised(model, job.dtype, job.upcast, job.warm)
        else:
            fake.materialise(model)
    tracker.mark([p for p in model.parameters() if p.requires_grad], "adapters")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(
                lambda p: tracker.mark([p.grad] if p.grad is not None else [], "gradients")
            )


class Loop:
    """A job's training loop: whole steps, and what lives from one to the next."""

    def __init__(self, model: Any, job: Job, tracker: Tracker) -> None:
        self.model, self.job, self.tracker = model, job, tracker
        self.base = model.get_base_model() if job.method != "full" else model
        _patch(self.base, job)
        model.train()
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.trained, lr=1e-4, foreach=True)
        self.batch = {name: torch.zeros(job.batch, job.tokens, dtype=torch.int64) for name in ("input_ids", "labels")}
        tracker.mark(self.batch.values(), "batch")
        self.biased = any(getattr(m, "bias", None) is not None for m in model.modules() if isinstance(m, nn.Linear))
        self.held: list[Any] = []
        self.threads: set[str] = set()

    def make_state(self) -> None:
        """The optimiser's state without a step."""
        for parameter in self.trained:
            parameter.grad = torch.zeros_like(parameter)
        with self.tracker.role("optimizer"):
            self.optimiser.step()

    def step(self) -> None:
        """Forward, backward, update."""
        self._multiplies("forward")
        self.optimiser.zero_grad(set_to_none=True)
        out = self._forward()
        self._hold(out)
        loss, out = out["loss"], out if self.job.loop == PLAIN else None
        self._multiplies("backward")
        loss.backward()
        self.tracker.begin(Instant("update"))
        if self.job.clip:
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0, foreach=True)
        with self.tracker.role("optimizer"):
            self.optimiser.step()
        del loss, out
        gc.collect(0)

    def _multiplies(self, thread: str) -> None:
        """The first product of a thread makes cuBLAS's workspaces for it."""
        self.tracker.begin(Instant(thread))
        if thread not in self.threads:
            self.threads.add(thread)
            for nbytes in workspaces(self.job.capability, self.biased):
                self.tracker.hold(nbytes)

    def _forward(self) -> Any:
        if self.job.autocast is None:
            return self.model(**self.batch)
        # PEFT and bitsandbytes ask whether CUDA's autocast is on; the one that works on fake CPU tensors is the CPU's
        torch.set_autocast_enabled("cuda", True)
        try:
            with torch.autocast("cpu", self.job.autocast):
                return convert_outputs_to_fp32(self.model)(**self.batch)
        finally:
            torch.set_autocast_enabled("cuda", False)

    def _hold(self, out: Any) -> None:
        """What lives until the next step's outputs are there."""
        job, config = self.job, self.base.config
        if job.outputs_held:
            self.held[:] = [out.logits.detach()]
        if job.outputs_held == "cache":
            shape = (job.batch, job.tokens, 2 * config.hidden_size // config.num_attention_heads)
            self.held += [torch.empty(shape, dtype=job.dtype) for _ in range(config.num_hidden_layers)]


def _patch(base: Any, job: Job) -> None:
    """The model made to compute as the job's version of it did."""
    if job.loss is not None:
        base.loss_function = job.loss
    if job.fused:
        fused.patch(base, job.fused == "liger")
        if job.method == "qlora":
            fused_lora.patch(base)
    if job.float_logits and job.fused != "liger":
        base.lm_head.register_forward_hook(lambda module, args, out: out.float())
    if job.checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": job.reentrant})
        base.enable_input_require_grads()
