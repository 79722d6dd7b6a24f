"""What a layer that contracts multiplies, as a product of matrices if it is one; its gradients.

`torch.einsum` finds that out anew in each call, and adds no bias on the way.
"""

from __future__ import annotations

import math

import keras
import torch

from keras_tp.computations import Contraction
from keras_tp.matrices import times

# Of which Keras multiplies matrices as they are, on any device.
_MULTIPLIED = torch.float32, torch.bfloat16


def is_plain(
    x: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor | None, c: Contraction
) -> bool:
    """Whether Keras would find out that these are of one dtype, in which it multiplies them."""
    if kernel.dtype is not x.dtype or not (bias is None or bias.dtype is x.dtype):
        return False
    if c.equation:
        return x.dtype.is_floating_point
    if x.dtype is torch.float64:  # which may be float32 to Keras
        return keras.backend.result_type("float64", "float64") == "float64"
    return x.dtype in _MULTIPLIED


def contract(
    x: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor | None, c: Contraction
) -> torch.Tensor:
    """`x` times `kernel`, and `bias` added.

    Args:
        x: of one floating dtype with the others.
        kernel: full, or a shard of it.
        bias: None for none; added to the last dims of the result.
        c: how they are contracted.
    """
    if c.contracted is None:
        y = torch.einsum(c.equation, x, kernel)
        return y if bias is None else y + bias
    lead, shape = x.shape[: x.dim() - c.contracted], kernel.shape[c.contracted :]
    flat, matrix = _flat(x, c.contracted), _matrix(kernel, c.contracted)
    if bias is not None and bias.dim() <= len(shape):
        return times(flat, matrix, bias.expand(shape).reshape(-1)).reshape(*lead, *shape)
    y = times(flat, matrix).reshape(*lead, *shape)
    return y if bias is None else y + bias


def of_input(grad: torch.Tensor, kernel: torch.Tensor, c: Contraction) -> torch.Tensor:
    """The gradient of what was multiplied by `kernel`, of that of the result."""
    if c.contracted is None:
        return torch.einsum(f"{c.output},{c.kernel}->{c.input}", grad, kernel)
    kept = kernel.dim() - c.contracted
    lead = grad.shape[: grad.dim() - kept]
    given = times(_flat(grad, kept), _matrix(kernel, c.contracted).T)
    return given.reshape(*lead, *kernel.shape[: c.contracted])


def of_kernel(x: torch.Tensor, grad: torch.Tensor, c: Contraction) -> torch.Tensor:
    """The gradient of what multiplied `x`, of that of the result."""
    if c.contracted is None:
        return torch.einsum(f"{c.input},{c.output}->{c.kernel}", x, grad)
    kept = len(c.kernel) - c.contracted
    learnt = times(_flat(x, c.contracted).T, _flat(grad, kept))
    return learnt.reshape(*x.shape[x.dim() - c.contracted :], *grad.shape[grad.dim() - kept :])


def of_bias(grad: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The gradient of what was added to the result, of that of the result."""
    return grad.sum_to_size(bias.shape)


def _flat(x: torch.Tensor, last: int) -> torch.Tensor:
    """A matrix: of the last dims its columns, of all others its rows."""
    rows, columns = x.shape[: x.dim() - last], x.shape[x.dim() - last :]
    return x.reshape(math.prod(rows), math.prod(columns))


def _matrix(kernel: torch.Tensor, first: int) -> torch.Tensor:
    return kernel.reshape(math.prod(kernel.shape[:first]), math.prod(kernel.shape[first:]))
