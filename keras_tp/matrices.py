"""Products of float32 matrices on CPUs, by the faster of the libraries that torch brings.

torch multiplies with MKL, which on AMD's processors with AVX-512 comes to less than half the speed
of oneDNN, which torch brings for convolutions (`benchmarks/products.py`, on a Zen 5). Which of
them multiplies depends on the processor and on sizes alone, never on a measurement, so that a run
can be repeated. `torch.backends.mkldnn.enabled = False`, torch's own switch, leaves all to MKL.
"""

from __future__ import annotations

from typing import Any

import torch

# Below, the longer way to the other library costs what it saves.
_SMALLEST = 2**20  # multiplications

# An operation of its own, so that a compiler takes operands as they lie in memory. Torch's way
# to this product is private; `FASTER` says whether it is there.
_LIBRARY = torch.library.Library("keras_tp", "FRAGMENT")
_LIBRARY.define("times(Tensor a, Tensor b, Tensor? bias) -> Tensor")


def _one_dnn(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b.T, bias, "none", [], "")


_LIBRARY.impl("times", _one_dnn, "CPU")


@torch.library.register_fake("keras_tp::times", lib=_LIBRARY)
def _shape(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def _is_faster() -> bool:
    """Whether this processor is one on which oneDNN is the faster, and torch has it."""
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if not there or not hasattr(torch.cpu, "get_capabilities"):  # which older ones have not
        return False
    processor = torch.cpu.get_capabilities()
    return "AMD" in processor.get("cpu_name", "") and bool(processor.get("avx512_f"))


FASTER = _is_faster()


def times(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`a` times `b`, and `bias` added to each row; differentiable, any number of times.

    Args:
        a: (rows, inner).
        b: (inner, columns), of the same dtype, in any order in memory.
        bias: (columns,), or None.
    """
    if not _by_one_dnn(a, b):
        return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)
    if torch.is_grad_enabled() and (
        a.requires_grad or b.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _Times.apply(a, b, bias)
    return torch.ops.keras_tp.times(a, b, bias)


def _by_one_dnn(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        FASTER
        and a.dtype is b.dtype is torch.float32
        and a.device.type == "cpu"
        and a.shape[0] * b.numel() >= _SMALLEST
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
    )


class _Times(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(a, b)
        return torch.ops.keras_tp.times(a, b, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        a, b = ctx.saved_tensors
        wants_a, wants_b, wants_bias = ctx.needs_input_grad
        return (
            times(grad, b.T) if wants_a else None,
            times(a.T, grad) if wants_b else None,
            grad.sum(0) if wants_bias else None,
        )
