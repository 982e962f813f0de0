"""A family's own blocks run by our kernels, where a trial shows that they compute the same.

Nothing is assumed of a family's code: its norm, its gated feed-forward and its attention are called once on a few
small random numbers, beside ours, and what differs stays as it is. So a family that nobody has looked at is fused
where it may be, and one that does something of its own is left alone.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ftrun.kernels import compiled, gated, norm, rotary
from ftrun.kernels.dense import features, is_linear
from ftrun.kernels.lora import together
from ftrun.models.forward import TRIAL, attend, seen_in_trial

Found = tuple[Callable[..., Any], Any] | None  # a forward pass of ours, and what it must know

_TOKENS, _WIDTH, _INNER = 6, 8, 10  # of a trial
_SCALES = (1.0, 1e3)  # of its numbers: the larger ones meet what a family clamps
_CLOSE = 1e-5  # of the largest number: two orders of float32 sums
_OUT = ("o_proj", "dense", "out_proj")  # what families call the product that ends attention
# what a trial may stumble over in code that is nothing like what is looked for
_OTHER = (RuntimeError, TypeError, AttributeError, ValueError, IndexError, KeyError, AssertionError)


def fuse(model: nn.Module) -> None:
    """Gives modules of the model forward passes by our kernels; the family's own wherever those do not apply."""
    known: dict[Hashable, Any] = {}
    for module in model.modules():
        for found in (_is_norm, _is_gated, _is_attention):
            key = (found, _kind(module))
            if key not in known:
                known[key] = None
                with contextlib.suppress(*_OTHER):
                    known[key] = found(module)
            if known[key] is not None:
                run, how = known[key]
                module.forward = functools.partial(run, module, module.forward, how)


def _kind(module: nn.Module) -> Hashable:
    """What the outcome of a trial depends on."""
    plain = (bool, int, float, str, type(None))
    own = {k: v for k, v in vars(module).items() if isinstance(v, plain) and k not in ("layer_idx", "training")}
    inside = tuple((name, type(child)) for name, child in module._modules.items())
    config = id(getattr(module, "config", None))
    return type(module), tuple(sorted(own.items(), key=str)), inside, tuple(module._parameters), config


# --- root mean square norm ---


def _norm(module: Any, own: Callable[..., torch.Tensor], form: str, *args: Any, **kwargs: Any) -> torch.Tensor:
    weight = module.weight
    if kwargs or len(args) > 1 or weight.requires_grad or not compiled.takes(args[0], weight):
        return own(*args, **kwargs)
    return norm.fast(args[0], weight, _eps(module), form)


def _is_norm(module: Any) -> Found:
    """How it runs by our kernel: the norm's form. None where it is another module."""
    named = type(module).__name__.endswith("RMSNorm") and list(module._parameters) == ["weight"]
    if not named or module.weight.dim() != 1:
        return None
    twin, x = _with_numbers(module), _numbers(_TOKENS, module.weight.shape[0])
    for form in norm.FORMS:
        if all(_same(twin(by * x), norm.reference(by * x, twin.weight, _eps(twin), form)) for by in _SCALES):
            break
    else:
        return None
    if form != "plus_one":  # float32 does not tell where it rounds to 16 bits
        twin.__dict__["_parameters"] = {"weight": nn.Parameter(twin.weight.bfloat16(), requires_grad=False)}
        own, x = twin(x.bfloat16()), x.bfloat16()
        form = min(norm.FORMS[:2], key=lambda one: _differ(own, norm.reference(x, twin.weight, _eps(twin), one)))
    return _norm, form


def _differ(one: torch.Tensor, other: torch.Tensor) -> int:
    """How many numbers are not the same."""
    return int((one != other).sum())


def _eps(module: Any) -> float:
    return float(getattr(module, "variance_epsilon", None) or module.eps)


# --- gated feed-forward ---


def _gated(module: Any, own: Callable[..., torch.Tensor], act: str, *args: Any, **kwargs: Any) -> torch.Tensor:
    if kwargs or len(args) > 1 or not compiled.takes(args[0]):
        return own(*args, **kwargs)
    gate, up = together(args[0], (module.gate_proj, module.up_proj))
    made = gated.fast(gate, up, act) if compiled.takes(gate, up) else gated.reference(gate, up, act)
    out: torch.Tensor = module.down_proj(made)
    return out


def _is_gated(module: Any) -> Found:
    """How it runs by our kernel: its activation. None where it is another module."""
    if not {"gate_proj", "up_proj", "down_proj"} <= set(module._modules):
        return None
    small = {"gate_proj": (_WIDTH, _INNER), "up_proj": (_WIDTH, _INNER), "down_proj": (_INNER, _WIDTH)}
    twin, x = _with_small(module, small), _numbers(_TOKENS, _WIDTH)
    for act in gated.ACTS:

        def ours(x: torch.Tensor, act: str = act) -> torch.Tensor:
            made: torch.Tensor = twin.down_proj(gated.reference(twin.gate_proj(x), twin.up_proj(x), act))
            return made

        if all(_same(twin(by * x), ours(by * x)) for by in _SCALES):
            return _gated, act
    return None


# --- attention ---


@dataclass(frozen=True)
class Attention:
    """How a family makes heads of its input, and what it tells its attention function.

    normed: where queries and keys are normed ("heads", "whole", or "" where they are not). turned: whether they are
    turned by rotary angles.
    """

    out: str
    normed: str
    turned: bool
    told: dict[str, Any] = field(hash=False)


def _attention(module: Any, own: Callable[..., Any], how: Attention, *args: Any, **kwargs: Any) -> Any:
    hidden = args[0] if args else kwargs["hidden_states"]
    more = {k: v for k, v in kwargs.items() if k not in ("hidden_states", "position_embeddings", "attention_mask")}
    angles = kwargs.get("position_embeddings")
    strange = len(args) > 1 or more.get("past_key_values") is not None or kwargs.get("attention_mask") is not None
    if strange or more.get("row_lengths") is None or angles is None or not compiled.takes(hidden, *angles):
        return own(*args, **kwargs)
    q, k, v = _heads(module, how, hidden, angles, rotary.fast)
    out, _ = attend(module, q, k, v, None, **{**more, **how.told})
    return getattr(module, how.out)(out.reshape(*hidden.shape[:-1], -1)), None


def _heads(
    module: Any,
    how: Attention,
    hidden: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    turn: Callable[..., torch.Tensor],
) -> list[torch.Tensor]:
    """Queries, keys and values, (B, heads, T, D)."""
    found = list(together(hidden, (module.q_proj, module.k_proj, module.v_proj)))
    norms = (getattr(module, "q_norm", None), getattr(module, "k_norm", None), None)
    if how.normed == "whole":
        found = [x if n is None else n(x) for x, n in zip(found, norms, strict=True)]
    found = [x.view(*x.shape[:-1], -1, module.head_dim) for x in found]
    if how.normed == "heads":
        found = [x if n is None else n(x) for x, n in zip(found, norms, strict=True)]
    q, k, v = (x.transpose(1, 2) for x in found)
    return [turn(q, *angles), turn(k, *angles), v] if how.turned else [q, k, v]


def _is_attention(module: Any) -> Found:
    """How it runs by our kernels. None where it is another module, or one that does more."""
    parts = [module._modules.get(name) for name in ("q_proj", "k_proj", "v_proj")]
    out = next((name for name in _OUT if name in module._modules), None)
    linear = all(part is not None and is_linear(part) for part in parts)
    if out is None or not linear or not isinstance(getattr(module, "head_dim", None), int):
        return None
    sizes = {name: (_WIDTH, _features(module, name)) for name in ("q_proj", "k_proj", "v_proj")}
    twin = _with_small(module, {**sizes, out: (sizes["q_proj"][1], _WIDTH)})
    for name in ("q_norm", "k_norm"):
        if name in twin._modules:
            twin._modules[name] = _with_numbers(twin._modules[name])
    twin.config = copy.copy(twin.config)
    twin.config._attn_implementation_internal = TRIAL
    normed = ("heads", "whole", "") if "q_norm" in twin._modules else ("",)
    for one, turned, width in itertools.product(normed, (True, False), _angles(twin)):
        with contextlib.suppress(*_OTHER):
            found = _tried(twin, Attention(out, one, turned, {}), width)
            if found is not None:
                return _attention, found
    return None


def _tried(twin: Any, how: Attention, width: int) -> Attention | None:
    x, angles = _numbers(1, _TOKENS, _WIDTH), (_numbers(1, _TOKENS, width), _numbers(1, _TOKENS, width))
    with seen_in_trial() as calls:
        own = twin(hidden_states=x, position_embeddings=angles, attention_mask=None)
    heads, told = calls[0]
    ours = _heads(twin, how, x, angles, rotary.reference)
    same = all(_same(a, b) for a, b in zip(heads, ours, strict=True))
    out = getattr(twin, how.out)(ours[0].transpose(1, 2).reshape(1, _TOKENS, -1))
    if len(calls) != 1 or not same or len(own) != 2 or not _same(own[0], out):
        return None
    return Attention(how.out, how.normed, how.turned, {k: v for k, v in told.items() if v is not None})


def _angles(module: Any) -> Iterator[int]:
    """How many numbers of a head may be turned."""
    yield module.head_dim
    rope = getattr(module.config, "rope_parameters", None) or {}
    share = rope.get("partial_rotary_factor") or getattr(module.config, "partial_rotary_factor", None)
    if isinstance(share, float) and share < 1:
        yield int(module.head_dim * share)


def _features(module: Any, name: str) -> int:
    return features(getattr(module, name))[1]


# --- what trials are made of ---


class _Small(nn.Module):
    """A linear layer of random numbers, drawn apart from the run's own."""

    def __init__(self, wide: int, tall: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(_numbers(tall, wide), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight)


def _with_small(module: nn.Module, sizes: dict[str, tuple[int, int]]) -> Any:
    """The module with small layers in the place of these."""
    twin = copy.copy(module)
    twin.__dict__["_modules"] = {**module._modules, **{name: _Small(*size) for name, size in sizes.items()}}
    return twin


def _with_numbers(module: Any) -> Any:
    """The norm with random numbers for its weight."""
    twin = copy.copy(module)
    twin.__dict__["_parameters"] = {"weight": nn.Parameter(_numbers(*module.weight.shape), requires_grad=False)}
    return twin


def _numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float32)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and bool((one - other).abs().max() <= _CLOSE * one.abs().max())
