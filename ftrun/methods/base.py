"""What every method is: parameters beside (or of) a frozen model, put on, drawn, saved, loaded, merged, taken off.

A method replaces modules of the model by wrappers that hold the old module and a few trained parameters. A wrapper
knows its name in the model before anything was wrapped, its parameters' names in the file, how they start and what
the merged layer is; `Tuner` is the walk over the wrappers.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import nn

from ftrun.errors import UserError, nearest
from ftrun.kernels.dense import Dense, is_conv1d
from ftrun.values import Anatomy

FILE_PREFIX = "base_model.model."  # PEFT's, in front of every module name in a file
O = TypeVar("O")  # noqa: E741
_SUMS = 16  # bytes an element while it is merged: in float32 the weight, the update, the scaled update and their sum


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


class Trained(NamedTuple):
    """A trained parameter: its optimiser group, itself, and how its file holds it where that differs."""

    group: str
    parameter: nn.Parameter
    write: Callable[[torch.Tensor], torch.Tensor] = _same
    read: Callable[[torch.Tensor], torch.Tensor] = _same


class Wrapper(nn.Module):
    """A module of the base, with a method's parameters beside it.

    name: the module's dotted name in the bare model; filed: the name that its file knows it by, mostly the same.
    `enabled` false gives the base's own output. `settled` true promises that no value changes and no gradient is
    asked for: then what is derived from the values is kept from one pass to the next.
    """

    base: Any  # an nn.Module: linear, embedding or a whole feed-forward, plain or quantised
    settled = False

    def __init__(self, name: str, base: nn.Module) -> None:
        super().__init__()
        self.name, self.filed, self.base, self.enabled = name, name, base, True

    def own(self) -> dict[str, Trained]:
        """The trained parameters by their names in the file, after the module's."""
        raise NotImplementedError

    def reset(self, seed: int) -> None:
        """Draws the parameters' first values, the same for a seed and a name on every device."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Refreshes what the wrapper derives from the base's weights; called once the base holds its values."""

    def seen(self, x: torch.Tensor) -> torch.Tensor:
        """What the base is given of the input x: all of it, but for the ids that only the method knows."""
        return x

    def joined(self, x: torch.Tensor, out: Any) -> Any:
        """What base and method make of x, where `out` is what the base alone makes of it; without a gradient. So rows
        of several adapters share one product of their base.
        """
        raise NotImplementedError

    def settle(self, on: bool) -> None:
        """Begins, or ends, a time in which no value changes."""
        self.settled = on

    def merged_weight(self) -> torch.Tensor:
        """The one matrix that does what base and method do: (out, in), float32; an embedding's is (tokens, width)."""
        raise NotImplementedError

    def merged_bias(self) -> torch.Tensor | None:
        """The bias that goes with `merged_weight`."""
        return self.bias

    def merged(self) -> nn.Module:
        """The plain layer with the merged weight in the base's dtype; the base itself is left as it is."""
        return with_weight(self.base, self.merged_weight())

    def generator(self, seed: int) -> torch.Generator:
        """A CPU generator that depends on the seed and on this module's name alone."""
        digest = hashlib.sha256(f"{seed}:{self.name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def rescale(self, factor: float) -> None:
        """Takes so much of what was trained: 1 all of it, 0 the base itself. Counted from the trained values each time.

        Raises UserError where there is no in-between.
        """
        raise UserError(
            f"scale={factor:g}: {type(self).__name__} has no update that could be scaled; only 1 is possible"
        )

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight: some models ask a layer for its dtype."""
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return getattr(self.base, "bias", None)


class Tuner(Generic[O]):
    """A method at work on a model. Subclasses give `wrap`; the walk over the wrappers is here.

    needs: which part of the anatomy `attach` reads ("sites", "blocks", "embeddings", "all"). merges: whether
    base and method can become one plain model; `why_not` says why where they cannot. switchable: whether
    `disabled` can give the base back for a while. prefix: virtual tokens in front of every row. last_factors: ends of
    the names of tensors that start at zero, so that an update does nothing before it was trained.
    """

    needs: ClassVar[str] = "sites"
    merges: ClassVar[bool] = True
    why_not: ClassVar[str] = ""
    switchable: ClassVar[bool] = True
    last_factors: ClassVar[tuple[str, ...]] = ()
    prefix: int = 0

    def __init__(self, options: O) -> None:
        self.options = options
        self._aside: dict[str, nn.Module] = {}
        self._tied: bool | None = None

    def attach(self, model: nn.Module, anatomy: Anatomy, kernels: str = "fast") -> None:
        """Freezes the model and puts the method's modules in place; on real, fake and meta tensors alike.

        kernels: "fast" or "reference". The new parameters hold no values yet: `initialise` or `load_state` follows.
        Raises UserError where the options do not suit this model.
        """
        model.requires_grad_(False)
        for wrapper in self.wrap(model, anatomy, kernels):
            swap(model, wrapper.name, wrapper.train(wrapper.base.training))

    def wrap(self, model: nn.Module, anatomy: Anatomy, kernels: str) -> list[Wrapper]:
        """The wrappers of the model's modules, each with its name; nothing is replaced yet."""
        raise NotImplementedError

    def initialise(self, model: nn.Module, seed: int, tokenizer: Any = None) -> None:
        """First values for every parameter; step 0 equals the base exactly. Nothing happens on abstract tensors."""
        for wrapper in wrappers(model):
            if not any(is_abstract(t.parameter) for t in wrapper.own().values()):
                wrapper.prepare()
                wrapper.reset(seed)

    def named(self, model: nn.Module) -> dict[str, Trained]:
        """Every trained parameter by its name in the file."""
        return {
            f"{FILE_PREFIX}{wrapper.filed}.{suffix}": item
            for wrapper in wrappers(model)
            for suffix, item in wrapper.own().items()
        }

    def groups(self, model: nn.Module) -> dict[str, list[nn.Parameter]]:
        """The trained parameters by optimiser group ("A", "B", "magnitude", "other", …), each once."""
        found: dict[str, list[nn.Parameter]] = {}
        seen: set[int] = set()
        for trained in self.named(model).values():
            if id(trained.parameter) not in seen:
                seen.add(id(trained.parameter))
                found.setdefault(trained.group, []).append(trained.parameter)
        return found

    def state(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """The trained values under their names in the file; mostly views of the live parameters, without gradient."""
        return {name: t.write(t.parameter.detach()) for name, t in self.named(model).items()}

    def load_state(self, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copies saved values in. Raises UserError as `fitting` does."""
        for wrapper in wrappers(model):
            wrapper.prepare()
        tensors = self.fitting(model, tensors)
        with torch.no_grad():
            for name, trained in self.named(model).items():
                trained.parameter.copy_(trained.read(tensors[name]))

    def fitting(self, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """A file's tensors by the names that `state` gives. The model may be on meta: no value is looked at.

        UserError names the first tensor that has no place, is missing or misshapen.
        """
        named = self.named(model)
        tensors = self.readable(model, tensors)
        match_names(tensors, named)
        for name, trained in named.items():
            found, expected = tensors[name], trained.write(trained.parameter.detach()).shape
            if found.shape != expected:
                raise UserError(
                    f"adapter: {name} has the shape {tuple(found.shape)}, expected {tuple(expected)}: "
                    "it was trained with other options (rank, targets) or on another base"
                )
        return tensors

    def check(self, config: Mapping[str, Any]) -> None:
        """UserError where a file's adapter_config.json means another function than these options do: its scale, say."""

    def check_same(self, config: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """UserError on the first of these keys that has another value in the config."""
        for key, value in own.items():
            if config.get(key) != value:
                raise UserError(
                    f"adapter: its adapter_config.json has {key}={config.get(key)!r}, this job's method={self.kind} "
                    f"{value!r}"
                )

    def readable(self, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """The tensors of a file under the names that `state` gives; a method may know other spellings."""
        return tensors

    def adapter_config(self, anatomy: Anatomy, base_name: str) -> dict[str, Any]:
        """PEFT's adapter_config.json for this method on this base; {} where there is no adapter."""
        raise NotImplementedError

    def effective_ranks(self, model: nn.Module) -> dict[str, float] | None:
        """How much of its rank each tuned module's update uses, by the module's name; None where no update has one."""
        return None

    def merge(self, model: nn.Module, made: Callable[[Wrapper], nn.Module] | None = None) -> None:
        """Puts merged layers in place, under the bare model's names; the wrappers wait for `unmerge`.

        made: the layer for a wrapper, where it is not the plain one in the base's dtype. Raises UserError where the
        method does not merge.
        """
        if not self.merges:
            raise UserError(f"method={self.kind}: cannot be merged: {self.why_not}")
        for wrapper in list(wrappers(model)):
            swap(model, wrapper.name, made(wrapper) if made else wrapper.merged())
            self._aside[wrapper.name] = wrapper
        self._tied = _retie(model, None)

    def unmerge(self, model: nn.Module) -> None:
        """Puts the wrappers back, with the very tensors of the base."""
        for name, wrapper in self._aside.items():
            swap(model, name, wrapper)
        self._aside = {}
        _retie(model, self._tied)

    def merging_bytes(self, model: nn.Module, dtype: torch.dtype) -> int:
        """Bytes that `merge` takes beside the model: a plain copy of each wrapped module in `dtype`, the base's compute
        dtype, and the largest one's sums in float32.
        """
        sizes = [_elements(wrapper.base) for wrapper in wrappers(model)]
        return sum(sizes) * dtype.itemsize + _SUMS * max(sizes, default=0)

    @contextlib.contextmanager
    def disabled(self, model: nn.Module) -> Iterator[None]:
        """The base alone, for a while. UserError where the method changed the base itself."""
        if not self.switchable:
            raise UserError(f"method={self.kind}: trains the base's own weights, so the base cannot be had back")
        for wrapper in wrappers(model):
            wrapper.enabled = False
        try:
            yield
        finally:
            for wrapper in wrappers(model):
                wrapper.enabled = True

    @contextlib.contextmanager
    def settled(self, model: nn.Module) -> Iterator[None]:
        """For a while no value changes and no gradient is asked for: generation need not derive the same anew for
        every token.
        """
        found = list(wrappers(model))
        for wrapper in found:
            wrapper.settle(True)
        try:
            yield
        finally:
            for wrapper in found:
                wrapper.settle(False)

    def scale(self, model: nn.Module, factor: float) -> None:
        """Takes so much of the update, from 1 (as trained) down to 0 (the base) or beyond. UserError where none can."""
        if factor != 1 and not self.switchable:
            raise UserError(f"scale={factor:g}: method={self.kind} changed the base's own weights; only 1 is possible")
        for wrapper in wrappers(model):
            wrapper.rescale(factor)

    def idle(self, tensors: Mapping[str, torch.Tensor]) -> list[str]:
        """The names, in a file of this method's, of updates that do nothing: their last factor is zero."""
        return [n for n, t in tensors.items() if n.endswith(self.last_factors) and not bool(t.any())]

    @property
    def kind(self) -> str:
        """The method's name: its file's."""
        return type(self).__module__.rpartition(".")[2]


def wrappers(model: nn.Module) -> Iterator[Wrapper]:
    """The model's wrappers, in the order of the model."""
    return (module for module in model.modules() if isinstance(module, Wrapper))


def swap(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` in the place of the submodule `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def parameter(shape: tuple[int, ...], like: nn.Module, dtype: torch.dtype) -> nn.Parameter:
    """A trained parameter of zeros on the device where the layer `like` lies."""
    return nn.Parameter(torch.zeros(shape, device=device_of(like), dtype=dtype))


def device_of(module: nn.Module) -> torch.device:
    """Where a layer's tensors lie, parameters or (quantised) buffers."""
    for tensors in (module.parameters(), module.buffers()):
        for tensor in tensors:
            return tensor.device
    raise AssertionError(f"{type(module).__name__} holds no tensor")


def is_abstract(tensor: torch.Tensor) -> bool:
    """Whether the tensor has no values: on the meta device, or fake."""
    return tensor.is_meta or type(tensor).__name__ == "FakeTensor" or type(tensor.data).__name__ == "FakeTensor"


def with_weight(base: nn.Module, weight: torch.Tensor) -> nn.Module:
    """A layer as `base`, with this (out, in) weight in the base's dtype; plain where the base is quantised."""
    if isinstance(base, Dense):
        plain = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(weight.to(base.dense().dtype), requires_grad=False)
        plain.register_parameter("bias", _frozen(getattr(base, "bias", None)))
        return plain
    own = base._parameters["weight"]
    assert own is not None
    clone = copy.copy(base)
    clone._parameters = dict(base._parameters)
    turned = weight.T.contiguous() if is_conv1d(base) else weight
    clone._parameters["weight"] = nn.Parameter(turned.to(own.dtype), requires_grad=False)
    return clone


def _elements(module: Any) -> int:
    """The elements of a module's weights, quantised ones by the shape that they stand for."""
    stored = sum(math.prod(m.shape) for m in module.modules() if hasattr(m, "parts"))
    return stored + sum(p.numel() for p in module.parameters())


def match_names(tensors: Mapping[str, Any], named: Mapping[str, Any]) -> None:
    """UserError on the first name that is in one and not in the other, with its nearest."""
    for name in tensors:
        if name not in named:
            close = nearest(name, named)
            raise UserError(
                f"adapter: no module takes the tensor {name!r}; nearest: {close!r}. It was trained with other "
                "targets or layers, or on another base"
            )
    for name in named:
        if name not in tensors:
            close = nearest(name, tensors)
            raise UserError(
                f"adapter: the file holds no tensor {name!r}; nearest: {close!r}. It was trained with other "
                "targets or layers, or on another base"
            )


def _frozen(bias: torch.Tensor | None) -> nn.Parameter | None:
    return None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)


def _retie(model: nn.Module, tied: bool | None) -> bool | None:
    """Keeps the config's tie_word_embeddings true to the tensors; gives the value that stood there."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "tie_word_embeddings"):
        return None
    before: bool = config.tie_word_embeddings
    if tied is not None:
        config.tie_word_embeddings = tied
    elif before:
        head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
        config.tie_word_embeddings = head is None or head.weight is embeddings.weight
    return before
