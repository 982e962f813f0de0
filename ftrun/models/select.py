"""Which weights of a model are which: `targets` and `layers` resolved by role, in any decoder-only architecture.

The structure is found, not known by family: the decoder's list of layers, in each the attention and the feed-forward,
and each linear layer's role by its name and by where it stands. A name that no table has keeps its place ("all" and
"attention" find it) and gets the role "other".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ftrun.errors import UserError, nearest
from ftrun.kernels.dense import features, is_linear
from ftrun.selection import KEYWORDS, Layers, Targets, check_targets, parse_layers
from ftrun.values import Anatomy, Block, Site

_ATTENTION = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "out_proj": "o",
    "c_proj": "o",
    "dense": "o",
    "wo": "o",
    "qkv_proj": "qkv",
    "query_key_value": "qkv",
    "c_attn": "qkv",
    "Wqkv": "qkv",
    "W_pack": "qkv",
    # DeepSeek's latent attention: the low-rank halves, then the full ones
    "q_a_proj": "q_a",
    "q_b_proj": "q",
    "kv_a_proj_with_mqa": "kv_a",
    "kv_b_proj": "kv",
}
_MLP = {
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "gate_up_proj": "gate_up",
    "fc1": "up",
    "fc2": "down",
    "c_fc": "up",
    "c_proj": "down",
    "fc_in": "up",
    "fc_out": "down",
    "dense_h_to_4h": "up",
    "dense_4h_to_h": "down",
    "w1": "gate",
    "w2": "down",
    "w3": "up",
}
_EXPERTS = {"gate_up_proj": "experts_gate_up", "down_proj": "experts_down", "up_proj": "experts_up"}
_ROUTERS = ("gate", "router", "shared_expert_gate", "wg")
_QV = ("q", "v", "qkv", "kv")  # a fused layer holds both: it is taken whole


@dataclass(frozen=True)
class _Part:
    """A site, and where it stands: "attention", "mlp", "experts", "router", "outside", "embeddings" or "head"."""

    site: Site
    place: str


def anatomy(model: nn.Module, targets: Targets, layers: Layers, experts: bool = True) -> Anatomy:
    """The parts of `model` that `targets` and `layers` select, before a method or a quantiser has touched it or after.

    `all` is every linear layer of the decoder but embeddings, head and routers; outside the layers (OPT-350M's
    projections) only where every layer is taken. `qv` takes a fused qkv whole. `re:PATTERN` matches the whole dotted
    name, as PEFT does, of linear layers and experts. A router is taken only by its name.
    experts: whether `all` and `mlp` take experts too (3-D parameters); a name that means them is refused if not.
    Raises UserError where `layers` leaves the model or has no effect, or an element of `targets` matches nothing.
    """
    stem, stack = _layers(model)
    embeddings, head = _ends(model)
    parts = list(_parts(model, stem, embeddings, head))
    chosen = parse_layers(layers, len(stack))
    taken: dict[str, _Part] = {}
    for target in check_targets(targets):
        taken |= {p.site.name: p for p in _match(target, parts, chosen, len(stack), experts)}
    if len(chosen) < len(stack) and all(p.site.layer is None for p in taken.values()):
        raise UserError(f"layers={layers}: has no effect, as targets={targets} takes nothing inside the layers")
    return Anatomy(
        sites=tuple(p.site for p in parts if p.site.name in taken),
        blocks=tuple(_block(parts, stem, i) for i in chosen),
        depth=len(stack),
        width=_width(model),
        embeddings=embeddings,
        head=head,
        tied=_weight(model, embeddings) is _weight(model, head),
    )


def describe(parts: Anatomy) -> list[tuple[str, str, int, int, int]]:
    """Rows for a table, equal layers as one: (layers, name in the layer, how many, in_features, out_features).

    ("0-29", "self_attn.q_proj", 30, 576, 576); outside the layers the first is "-" and the name the dotted one.
    """
    groups: dict[tuple[str, int, int], list[int | None]] = {}
    for site in parts.sites:
        name = site.name if site.layer is None else re.sub(rf"^.*?\.{site.layer}\.", "", site.name)
        groups.setdefault((name, site.in_features, site.out_features), []).append(site.layer)
    return [(spans([i for i in at if i is not None]), n, len(at), rows, cols) for (n, rows, cols), at in groups.items()]


def spans(numbers: list[int]) -> str:
    """Ascending numbers as ranges, as `layers` takes them: [0,1,2,5] -> "0-2,5"; "-" for none."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "-"


def _layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The dotted name of the decoder's list of layers, and the list."""
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    depth = getattr(config, "num_hidden_layers", None)
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and "visi" not in n and len(m)]
    outer = [(n, m) for n, m in lists if not any(n.startswith(f"{o}.") for o, _ in lists if o != n)]
    fitting = [pair for pair in outer if len(pair[1]) == depth] or outer
    if not fitting:
        raise UserError(f"{type(model).__name__}: no list of decoder layers in it, so targets and layers mean nothing")
    return max(fitting, key=lambda pair: len(pair[1]))


def _ends(model: nn.Module) -> tuple[str, str]:
    """The dotted names of the input embedding and of the output head."""
    names = {id(m): n for n, m in model.named_modules()}
    ends = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    if any(id(end) not in names for end in ends):
        raise UserError(f"{type(model).__name__}: no embedding or no head in it: not a causal language model")
    return names[id(ends[0])], names[id(ends[1])]


def _parts(model: nn.Module, stem: str, embeddings: str, head: str) -> Iterator[_Part]:
    """Every weight that can be named, in the model's order."""
    decoder = stem.rpartition(".")[0]
    for name, module in model.named_modules():
        if name in (embeddings, head):
            place = "embeddings" if name == embeddings else "head"
            rows, columns = module.weight.shape
            size = (rows, columns) if place == "embeddings" else (columns, rows)
            yield _Part(Site(name, place, None, *size), place)
        elif name.startswith(f"{stem}."):
            yield from _in_layer(name, module, stem)
        elif is_linear(module) and (name.startswith(f"{decoder}.") or not decoder):
            yield _Part(Site(name, "other", None, *features(module)), "outside")


def _in_layer(name: str, module: nn.Module, stem: str) -> Iterator[_Part]:
    layer, _, rest = name[len(stem) + 1 :].partition(".")
    if is_linear(module):
        place, role = _experts(rest) if hasattr(module, "experts") else _role(rest)
        yield _Part(Site(name, role, int(layer), *features(module)), place)
    elif "experts" in rest:
        for parameter, weight in module.named_parameters(recurse=False):
            if weight.dim() == 3:
                rows, columns = weight.shape[1:]
                size = (rows, columns) if getattr(module, "is_transposed", False) else (columns, rows)
                place, role = _experts(parameter)
                yield _Part(Site(f"{name}.{parameter}", role, int(layer), *size), place)


def _experts(path: str) -> tuple[str, str]:
    return "experts", _EXPERTS.get(path.rpartition(".")[2], "experts_other")


def _role(path: str) -> tuple[str, str]:
    """(place, role) of a linear layer by its path in the decoder layer ("self_attn.q_proj")."""
    *above, leaf = path.split(".")
    if leaf in _ROUTERS:
        return "router", "router"
    if any(re.search("attn|attention", part) for part in above):
        return "attention", _ATTENTION.get(leaf, "other")
    if any(re.search("mlp|ffn|feed_forward|expert|moe", part) for part in above) or (not above and leaf in _MLP):
        return "mlp", _MLP.get(leaf, "other")
    return "outside", "other"


def _match(target: str, parts: list[_Part], chosen: tuple[int, ...], depth: int, experts: bool) -> list[_Part]:
    """The parts that one element of `targets` takes; UserError where there are none."""
    everywhere = [p for p in parts if _takes(target, p, experts, whole=len(chosen) == depth)]
    found = [p for p in everywhere if p.site.layer is None or p.site.layer in chosen]
    refused = [p for p in found if p.place == "experts" and not experts]
    if refused:
        raise UserError(
            f"targets={target}: means the experts, {refused[0].site.name} and the like, which this job cannot tune"
        )
    if not found and everywhere:
        there = spans(sorted({p.site.layer for p in everywhere if p.site.layer is not None}))
        raise UserError(f"targets={target}: matches nothing in layers {spans(list(chosen))}; it is in layers {there}")
    if not found:
        raise UserError(_nothing(target, parts))
    return found


def _takes(target: str, part: _Part, experts: bool, whole: bool) -> bool:
    place, name = part.place, part.site.name
    if target in ("experts", "embeddings", "head"):
        return place == target
    if target == "all":
        outside = place == "outside" and (part.site.layer is not None or whole)
        return place in ("attention", "mlp") or outside or (place == "experts" and experts)
    if target == "mlp":
        return place == "mlp" or (place == "experts" and experts)
    if target == "attention":
        return place == "attention"
    if target == "qv":
        return part.site.role in _QV
    if target.startswith("re:"):
        return place not in ("router", "embeddings", "head") and re.fullmatch(target[3:], name) is not None
    return name == target or name.endswith(f".{target}")


def _nothing(target: str, parts: list[_Part]) -> str:
    """The message for an element that matches nothing: the nearest name, and what the model has."""
    leaves = list(dict.fromkeys(p.site.name.rpartition(".")[2] for p in parts))
    if target.startswith("re:"):
        sample = next(p.site.name for p in parts if p.site.layer is not None)
        why = "a pattern has to match the whole name, such as " + sample
        if any(re.fullmatch(target[3:], p.site.name) for p in parts):
            why = "routers, embeddings and head are not taken by a pattern: name them, targets=[…,head]"
        return f"targets={target}: matches nothing; {why}"
    close = None if target in KEYWORDS else nearest(target.rpartition(".")[2], [*leaves, *KEYWORDS])
    hint = f" Did you mean {close!r}?" if close else ""
    return f"targets={target}: matches nothing in this model.{hint} It has: {', '.join(leaves)}"


def _block(parts: list[_Part], stem: str, index: int) -> Block:
    """Where the two sublayers of decoder layer `index` end."""
    layer = f"{stem}.{index}"
    mine = [p for p in parts if p.site.layer == index]
    mixers = [p.site for p in mine if p.place == "attention"] or [p.site for p in mine if p.place == "outside"]
    ends = [s for s in mixers if s.role == "o"] or mixers
    if not ends:
        raise UserError(f"{layer}: no attention in it whose end could be found")
    feed = [p for p in mine if p.place in ("mlp", "experts")]
    sparse = any(p.place == "experts" for p in feed)
    downs = [p.site.name for p in feed if p.site.role == "down"]
    paths = [p.site.name[len(layer) + 1 :] for p in feed]
    owners = {path.partition(".")[0] for path in paths if "." in path}
    ffn = f"{layer}.{owners.pop()}" if len(owners) == 1 else None
    return Block(index, layer, ends[-1].name, None if sparse or not downs else downs[-1], ffn)


def _weight(model: nn.Module, name: str) -> object:
    return getattr(model.get_submodule(name), "weight", None)


def _width(model: nn.Module) -> int:
    return int(model.config.get_text_config().hidden_size)  # type: ignore[union-attr, operator]
