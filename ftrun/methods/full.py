"""Full fine-tuning: the model's own weights are trained, all of them or those that targets and layers select."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ftrun.errors import UserError
from ftrun.kernels.dense import Dense
from ftrun.methods import base
from ftrun.schema import option
from ftrun.selection import check_targets, parse_layers
from ftrun.values import Anatomy


@dataclass(frozen=True)
class Options:
    targets: str | list[str] | None = option(None, "weights that train; null = every one, embeddings and norms too")
    layers: str | int | list[str | int] = option("all", "decoder layers that train; the rest is frozen")
    dtype: str = option("float32", "dtype of the trained weights", choices=("float32", "bfloat16"))

    def __post_init__(self) -> None:
        if self.targets is not None:
            check_targets(self.targets)
        parse_layers(self.layers)


def check_job(job: Any) -> None:
    """UserError where the weights that are to train are stored in a form that cannot."""
    targets = job.method.options.targets
    named = {targets} if isinstance(targets, str) else set(targets or ("all",))
    whole = named & {"all", "attention", "mlp", "qv", "experts"}
    if whole and job.quant.kind != "none" and not getattr(job.quant.options, "skip", None):
        raise UserError(
            f"method=full with quant={job.quant.choice}: quantised weights cannot be trained themselves; use "
            "quant=none, or method=qlora over the quantised base"
        )
    if job.devices > 1 and job.strategy == "fsdp" and job.optim.options.by_tensor:
        raise UserError(
            f"method=full with optim={job.optim.choice}: found strategy=fsdp, where a device holds a part of each "
            "weight, and the update depends on the whole; use strategy=ddp, or another optim"
        )


class Tuner(base.Tuner[Options]):
    """Trains the selected parameters in place, as masters of `dtype`; where that is not the compute dtype, the loop
    runs the model under autocast. Merging is nothing: the model is the result.
    """

    needs = "all"
    switchable = False

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._names: tuple[str, ...] = ()

    def attach(self, model: nn.Module, anatomy: Anatomy, kernels: str = "fast") -> None:
        model.requires_grad_(False)
        owners = list(self._owners(model, anatomy))
        masters: dict[int, nn.Parameter] = {}
        for module, leaf in owners:
            old = module._parameters[leaf]
            assert old is not None
            if id(old) not in masters:
                masters[id(old)] = nn.Parameter(old.detach().to(getattr(torch, self.options.dtype)))
        # a tied weight stays one tensor wherever it is used
        for module in model.modules():
            for leaf, old in list(module._parameters.items()):
                if id(old) in masters:
                    module._parameters[leaf] = masters[id(old)]
        self._names = tuple(name for name, p in model.named_parameters() if p.requires_grad)

    def _owners(self, model: nn.Module, anatomy: Anatomy) -> Iterator[tuple[nn.Module, str]]:
        for name in self._modules(anatomy):
            owner, leaf = _owner(model, name)
            if leaf is not None:
                yield owner, leaf
                continue
            for module in owner.modules():
                if isinstance(module, Dense) and "weight" not in module._parameters:
                    raise UserError(
                        f"method=full: {name or 'the model'} is quantised and cannot be trained itself; use "
                        "quant=none, or method=lora over the quantised base"
                    )
                yield from ((module, own) for own, p in module._parameters.items() if p is not None)

    def _modules(self, anatomy: Anatomy) -> list[str]:
        """Dotted names of the modules (or 3-D parameters) whose parameters train; "" is the whole model."""
        if self.options.targets is not None:
            return [site.name for site in anatomy.sites]
        whole = len(anatomy.blocks) == anatomy.depth
        return [""] if whole else [block.name for block in anatomy.blocks]

    def initialise(self, model: nn.Module, seed: int, tokenizer: Any = None) -> None:
        """Nothing to draw: training starts from the base."""

    def named(self, model: nn.Module) -> dict[str, base.Trained]:
        found = {name: p for name, p in model.named_parameters() if p.requires_grad}
        return {n: base.Trained("matrices" if p.ndim > 1 else "vectors", p) for n, p in found.items()}

    def readable(self, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        # a whole model's folder also holds what this job does not train
        return {name: tensor for name, tensor in tensors.items() if name in self._names}

    def adapter_config(self, anatomy: Anatomy, base_name: str) -> dict[str, Any]:
        return {}

    def merge(self, model: nn.Module, made: Callable[[base.Wrapper], nn.Module] | None = None) -> None:
        """Nothing to do: the model is the result."""

    def unmerge(self, model: nn.Module) -> None:
        """Nothing to do: nothing was merged."""


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str | None]:
    """The module `name`; or, for a parameter's name, the module that owns it and the parameter's leaf."""
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    if leaf in owner._parameters:
        return owner, leaf
    return (model.get_submodule(name), None) if leaf else (model, None)
