"""A transformers model with PEFT's adapters on fake tensors, quantised or not: the peers' own modules."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

NF4_BLOCK, NESTED_BLOCK = 64, 256  # values a scale stands for; scales a scale of scales stands for


def skeleton(config: dict[str, Any], dtype: torch.dtype, attention: str) -> Any:
    """The model on the meta device, in `dtype`."""
    made = AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made, dtype=dtype, attn_implementation=attention)
    model.config.use_cache = False
    return model


def materialise(model: nn.Module) -> None:
    """Meta tensors become fake CPU tensors, module by module as nn.Module.to moves them. Under FakeTensorMode."""
    _materialise([(m, n) for m in model.modules() for n in m._parameters], {})
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _materialise(places: Iterable[tuple[nn.Module, str]], made: dict[int, nn.Parameter]) -> None:
    """The parameters at these places, in this order; a tied weight stays one."""
    for module, name in places:
        old = module._parameters[name]
        if old is not None and old.is_meta:
            if id(old) not in made:
                made[id(old)] = nn.Parameter(torch.empty(old.shape, dtype=old.dtype), old.requires_grad)
            module._parameters[name] = made[id(old)]


def load_quantised(model: nn.Module, dtype: torch.dtype, upcast: str, warm: bool) -> None:
    """As transformers and bitsandbytes load it: in the checkpoint's order, each weight in `dtype` before it is packed.

    upcast: "all", PEFT's prepare_model_for_kbit_training: every half parameter that is not packed goes to float32;
    "norms", TRL's peft_module_casting_to_bf16 after it: all but the norms go back.
    """
    made: dict[int, nn.Parameter] = {}
    olds = list(model.parameters())  # alive, so that no id is used twice
    if warm:  # transformers' caching_allocator_warmup: taken and given back at once
        torch.empty(sum(p.nbytes for p in olds if not p.requires_grad), dtype=torch.uint8)
    named = sorted(((n, m) for n, m in model.named_modules()), key=lambda pair: _natural(pair[0]))
    for _, module in named:
        if isinstance(module, Packed):
            module.load(dtype, made)
        else:
            _materialise(
                [(module, n) for n, p in module._parameters.items() if p is not None and not _adapter(p)], made
            )
    if upcast:
        for parameter in model.parameters():
            if not parameter.is_meta and parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()
    if upcast == "norms":
        for name, parameter in model.named_parameters():
            if not parameter.is_meta and "norm" not in name and parameter.dtype is torch.float32:
                parameter.data = parameter.data.to(dtype)
    del olds
    made.clear()
    materialise(model)


def _adapter(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad


def _natural(name: str) -> list[Any]:
    """The order of transformers' dot_natural_key: numbers as numbers."""
    name = name.replace("base_model.model.", "").replace(".base_layer", "")
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


class Packed(Linear4bit):
    """bitsandbytes' Linear4bit with its state as plain tensors: Params4bit cannot be built on fake ones."""

    def __init__(self, old: nn.Linear, nested: bool, compute: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = old.in_features, old.out_features
        self.compute_dtype, self.nested = compute, nested
        count = old.weight.numel()
        blocks = -(-count // NF4_BLOCK)
        self.weight = nn.Parameter(torch.empty(count // 2, 1, dtype=torch.uint8, device="meta"), requires_grad=False)
        self.weight.compress_statistics, self.weight.quant_type = nested, "nf4"  # type: ignore[attr-defined]
        self.bias = old.bias
        self.register_buffer("code", torch.empty(16, device="meta"))
        self.register_buffer(
            "absmax", torch.empty(blocks, dtype=torch.uint8 if nested else torch.float32, device="meta")
        )
        if nested:
            self.register_buffer("absmax2", torch.empty(-(-blocks // NESTED_BLOCK), device="meta"))
            self.register_buffer("code2", torch.empty(256, device="meta"))
            self.register_buffer("offset", torch.empty((), device="meta"))

    def load(self, dtype: torch.dtype, made: dict[int, nn.Parameter]) -> None:
        """bitsandbytes.functional.quantize_4bit on a weight that is on the device already."""
        whole = torch.empty(self.out_features, self.in_features, dtype=dtype)
        absmax = torch.empty(-(-whole.numel() // NF4_BLOCK), dtype=torch.float32)
        # torch._nn.Parameter loses attributes when it is made anew
        packed = nn.Parameter(torch.empty(self.weight.shape, dtype=torch.uint8), requires_grad=False)
        packed.compress_statistics, packed.quant_type = self.nested, "nf4"  # type: ignore[attr-defined]
        self.weight = packed
        self._buffers["code"] = torch.empty(16)
        if self.nested:
            self._buffers["offset"] = absmax.mean()
            absmax = absmax - self.offset
            self._buffers["code2"] = torch.empty(256)
            self._buffers["absmax2"] = torch.empty(self.absmax2.shape)
            self._buffers["absmax"] = torch.empty(self.absmax.shape, dtype=torch.uint8)
        else:
            self._buffers["absmax"] = absmax
        _materialise([(self, "bias")] if self.bias is not None else [], made)

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        """bitsandbytes.functional.dequantize_4bit: the scales first where they are quantised, then the values."""
        scales = self.absmax
        if self.nested:
            scales = torch.ops.bitsandbytes.dequantize_blockwise(
                self.absmax, self.absmax2, self.code2, NESTED_BLOCK, torch.float32
            )
            scales = scales + self.offset
        shape = (self.out_features, self.in_features)
        return torch.ops.bitsandbytes.dequantize_4bit(self.weight, scales, NF4_BLOCK, "nf4", shape, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As Linear4bit.forward: computed in compute_dtype, given back in the input's."""
        if self.bias is not None and self.bias.dtype != x.dtype:
            self.bias.data = self.bias.data.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        return MatMul4Bit.apply(x.to(self.compute_dtype), self, bias).to(x.dtype)


class MatMul4Bit(torch.autograd.Function):
    """bitsandbytes.autograd._functions.MatMul4Bit: nothing is kept but the packed weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Packed, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return torch.nn.functional.linear(x, layer.dequantised(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return torch.matmul(grad, ctx.layer.dequantised(grad.dtype).to(grad.dtype)), None, None


def quantise(model: nn.Module, nested: bool, compute: torch.dtype) -> None:
    """transformers' replace_with_bnb_linear: every linear layer but the head, on the meta device."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                setattr(parent, name, Packed(child, nested, compute))


def adapt(model: Any, rank: int, targets: list[str], dropout: float, dtype: torch.dtype) -> Any:
    """PEFT's LoRA with adapters in `dtype`, on the meta device."""
    for parameter in model.parameters():
        parameter.requires_grad = False
    options = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM")
    before = BaseTunerLayer._move_adapter_to_device_of_base_layer
    # nn.Module.to cannot swap fake parameters; they are made where they belong
    BaseTunerLayer._move_adapter_to_device_of_base_layer = lambda *a, **k: None  # type: ignore[method-assign]
    try:
        with torch.device("meta"):
            model = get_peft_model(model, options, autocast_adapter_dtype=False)
    finally:
        BaseTunerLayer._move_adapter_to_device_of_base_layer = before  # type: ignore[method-assign]
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return model


assert bnb is not None  # its import registers torch.ops.bitsandbytes
