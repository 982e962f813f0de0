"""Whether a family's own code lets packed rows be kept apart; what it declares, then what its forward pass did.

Our attention (ftrun/models/forward.py) is told where rows end. Whatever else mixes tokens, a recurrence, a convolution
or attention that the family computes itself, would leak from row to row, or see the future: our path has no mask.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ftrun.errors import UserError

# what transformers' configs call layers whose tokens mix by causal attention alone, with a window or without
_KINDS = ("full_attention", "sliding_attention", "attention")
# what some families hand to attention beside scores: each changes what comes out
_BIASES = ("s_aux", "position_bias", "sinks")


def check_packing(model: Any) -> None:
    """Raises UserError where the model's family says that packed rows would not be kept apart."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    other = next((kind for kind in kinds if kind not in _KINDS), None)
    if other is not None:
        raise refusal(model, f"it has layers of the kind {other}")
    if any(isinstance(m, nn.Conv1d) and m.kernel_size[0] > 1 for m in model.modules()):
        raise refusal(model, "it has convolutions over tokens")
    if not model._can_set_attn_implementation():
        raise refusal(model, "its attention is code of its own")


def refusal(model: Any, why: str) -> UserError:
    """The error for a model, or a config, that cannot run on packed rows."""
    family = getattr(model, "config", model).get_text_config().model_type
    return UserError(f"kernels=fast: {family} cannot run on packed rows ({why}). Say kernels=reference")


@dataclass
class Attended:
    """What our attention saw in one forward pass: the modules that called it, and those among them with a window."""

    modules: set[int] = field(default_factory=set)
    windowed: set[int] = field(default_factory=set)
    passed: set[int] = field(default_factory=set)  # places of layers that were passed by (ftrun/models/prefix.py)
    strange: str = ""

    def note(self, module: nn.Module, window: int | None, mask: torch.Tensor | None, more: dict[str, Any]) -> None:
        """One call of the attention function."""
        self.modules.add(id(module))
        if window is not None:
            self.windowed.add(id(module))
        bias = next((name for name in _BIASES if more.get(name) is not None), None)
        if mask is not None or bias is not None:
            self.strange = "its attention has a mask of its own" if bias is None else f"its attention takes {bias}"
        if not getattr(module, "is_causal", True):
            self.strange = "its attention is not causal"

    def check(self, model: Any) -> None:
        """Raises UserError unless every decoder layer that ran attended through our function, as its config says."""
        config = model.config.get_text_config()
        kinds = [k for n, k in enumerate(getattr(config, "layer_types", None) or ()) if n not in self.passed]
        if self.strange:
            raise refusal(model, self.strange)
        if len(self.modules) < config.num_hidden_layers - len(self.passed):
            raise refusal(model, "some of its layers do not hand on where rows end")
        if len(self.windowed) < sum(kind == "sliding_attention" for kind in kinds):
            raise refusal(model, "its layers do not hand on their window")
