"""The rules of `keras_tp.flows`: where the sharded dim goes in each torch function.

A rule is given a call and gives the sharded dim of each output, None where an output is the
same on every rank; where the sharded dim is mixed with itself (a sum over it, a softmax
along it, a cut into pieces) it raises `Unproven`. What a rule says is checked against
the shapes that the function gave on a rank.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import torch

from keras_tp.flows import Applied, Rule, Unproven, along, elementwise, even, outer


def _reshaped(call: Applied) -> list[int | None]:
    # Parts of a dim are blocks of memory (if it is the outermost of what is merged): the new
    # dim that begins where it begins is cut in the same blocks.
    tensor, dim = call.only()
    full, (out,) = call.full_of(tensor), call.out
    parts = full[dim] // tensor.shape[dim]
    for new, size in enumerate(out):
        begins = outer(out, new) == outer(full, dim) and size % parts == 0 and size > 1
        if begins and 0 not in full and even(out, new, parts) == call.local[0]:
            return [new]
    raise Unproven(f"{call.name} of {full} to {out} mixes the parts of dim {dim}")


def _permuted(call: Applied) -> list[int | None]:
    tensor, dim = call.only()
    probe = torch.empty([*range(2, 2 + tensor.dim())], device="meta")
    moved = call.function(probe, *call.args[1:], **call.kwargs)
    return [tuple(moved.shape).index(2 + dim)]


def _at(position: int, *, default: Any = None) -> Rule:
    """A function that works along one dim or some, which it keeps."""

    def rule(call: Applied) -> list[int | None]:
        tensor, dim = call.only()
        where = call.get(position, "dim", "axis", "dims", default=default)
        if where is None:
            raise Unproven(f"{call.name} over all dims")
        if dim in _dims(where, tensor.dim()):
            raise Unproven(f"{call.name} along the sharded dim")
        return [dim] * len(call.out)

    return rule


def _dims(where: Any, ndim: int) -> list[int]:
    return [d % ndim for d in ([where] if isinstance(where, int) else where)]


def _reduced(call: Applied) -> list[int | None]:
    tensor, dim = call.only()
    where = call.get(1, "dim", "axis")
    if not isinstance(where, int | tuple | list) or isinstance(where, bool) or where == []:
        raise Unproven(f"{call.name} over all dims")
    dims = _dims(where, tensor.dim())
    if dim in dims:
        raise Unproven(f"{call.name} over the sharded dim")
    kept = len(call.out[0]) == tensor.dim()
    return [dim if kept else dim - sum(d < dim for d in dims)] * len(call.out)


def _contracted(call: Applied, terms: list[str], output: str, operands: Sequence[Any]) -> list[int]:
    """The rule of a product written as an equation."""
    cut = {
        labels[dim]
        for labels, operand in zip(terms, operands, strict=True)
        if (dim := call.dim_of(operand)) is not None
    }
    if len(cut) != 1:
        raise Unproven(f"{call.name} of shards along different dims")
    (label,) = cut
    for labels, operand in zip(terms, operands, strict=True):
        if label in labels and call.dim_of(operand) is None:
            dim = labels.index(label)
            if call.full_of(operand)[dim] != 1:  # else it is broadcast
                raise Unproven(f"{call.name} of a shard and a whole tensor")
    if label not in output:
        raise Unproven(f"{call.name} contracts the sharded dim, and no row layer sums it")
    return [output.index(label)]


def _einsum(call: Applied) -> Sequence[int | None]:
    equation, *operands = call.args
    if len(operands) == 1 and isinstance(operands[0], tuple | list):
        operands = list(operands[0])
    if not isinstance(equation, str) or "->" not in equation:
        raise Unproven("einsum without an output")
    left, output = equation.replace(" ", "").split("->")
    terms = left.split(",")
    if "." in equation:
        # Letters of their own for the dims that "..." stands for.
        spare = [label for label in string.digits if label not in equation]
        count = max(
            operand.dim() - len(term.replace("...", ""))
            for term, operand in zip(terms, operands, strict=True)
            if "..." in term
        )

        def spelled(term: str, ndim: int) -> str:
            own = ndim - len(term.replace("...", ""))
            return term.replace("...", "".join(spare[count - own : count]))

        terms = [spelled(t, o.dim()) for t, o in zip(terms, operands, strict=True)]
        output = spelled(output, len(call.out[0]))
    if any(len(set(term)) < len(term) for term in (*terms, output)):
        raise Unproven("einsum that repeats a label")
    return _contracted(call, terms, output, operands)


def _matmul(call: Applied) -> Sequence[int | None]:
    a, b = call.get(0, "input"), call.get(1, "other", "mat2")
    if a.dim() < 2 or b.dim() < 2:
        raise Unproven(f"{call.name} with a vector")
    batch = "".join(chr(ord("A") + i) for i in range(len(call.out[0]) - 2))
    one = batch[len(batch) - (a.dim() - 2) :] + "mk"
    other = batch[len(batch) - (b.dim() - 2) :] + "kn"
    return _contracted(call, [one, other], batch + "mn", [a, b])


def _linear(call: Applied) -> Sequence[int | None]:
    x = call.get(0, "input")
    dim = call.dim_of(x)
    if dim is None or dim == x.dim() - 1 or any(call.dim_of(t) is not None for t in call.args[1:]):
        raise Unproven("linear on a shard of its features")
    return [dim]


def _attention(call: Applied) -> Sequence[int | None]:
    query, key, value = (call.get(i, n) for i, n in enumerate(("query", "key", "value")))
    dims = {call.dim_of(t) for t in (query, key, value)}
    dim = dims.pop()
    if dims or dim is None or dim >= query.dim() - 2:
        raise Unproven("attention over the sharded dim, or with whole keys")
    mask = call.get(3, "attn_mask")
    if mask is not None:
        at = dim - query.dim()
        own = call.dim_of(mask)
        if own is not None and own - mask.dim() != at:
            raise Unproven("attention with another shard of a mask")
        if own is None and mask.dim() >= -at and call.full_of(mask)[at] != 1:
            raise Unproven("attention with a whole mask for each head")
    if call.get(4, "dropout_p", default=0.0):
        raise Unproven("attention that draws dropout itself")
    return [dim]


def _indexed(call: Applied) -> Sequence[int | None]:
    tensor, index = call.args
    dim = call.flow_of(tensor).dim
    if dim is None:
        raise Unproven("indices that are shards")
    entries = list(index) if isinstance(index, tuple) else [index]
    if any(not isinstance(e, int | slice | type(None) | type(Ellipsis)) for e in entries):
        raise Unproven("indexing with tensors")
    used = sum(isinstance(e, int | slice) for e in entries)
    at = entries.index(Ellipsis) if Ellipsis in entries else len(entries)
    entries[at : at + 1] = [slice(None)] * (tensor.dim() - used)
    old, new = 0, 0
    for entry in entries:
        if entry is None:
            new += 1
            continue
        if old == dim:
            if entry != slice(None):
                raise Unproven("indexing along the sharded dim")
            return [new]
        old += 1
        new += isinstance(entry, slice)
    raise AssertionError(entries)


def _pieces(call: Applied) -> Sequence[int | None]:
    tensor, dim = call.only()
    if along(call.get(2, "dim", "axis", default=0), tensor.dim()) == dim:
        raise Unproven(f"{call.name} cuts the sharded dim")
    return [dim] * len(call.out)


def _unbound(call: Applied) -> Sequence[int | None]:
    tensor, dim = call.only()
    where = call.get(1, "dim", default=0) % tensor.dim()
    if where == dim:
        raise Unproven(f"{call.name} along the sharded dim")
    return [dim - (where < dim)] * len(call.out)


def _concatenated(call: Applied) -> Sequence[int | None]:
    tensors = list(call.get(0, "tensors"))
    dims = {call.dim_of(t) for t in tensors}
    dim = dims.pop()
    stacked = call.name == "stack"
    where = call.get(1, "dim", "axis", default=0) % (tensors[0].dim() + stacked)
    if dims or dim is None:
        raise Unproven(f"{call.name} of shards and whole tensors")
    if stacked:
        return [dim + (where <= dim)]
    if where == dim:
        raise Unproven(f"{call.name} along the sharded dim")
    return [dim]


def _repeated(call: Applied) -> Sequence[int | None]:
    # Each entry several times in place: blocks of the dim stay blocks.
    _, dim = call.only()
    if call.get(2, "dim") is None or not isinstance(call.get(1, "repeats"), int):
        raise Unproven("repeat_interleave of all dims, or as often as a tensor says")
    return [dim]


def _expanded(call: Applied) -> Sequence[int | None]:
    tensor, dim = call.only()
    return [dim - tensor.dim() + len(call.out[0])]


def _padded(call: Applied) -> Sequence[int | None]:
    tensor, dim = call.only()
    pad = list(call.get(1, "pad"))
    at = tensor.dim() - 1 - dim
    if any(pad[2 * at : 2 * at + 2]):
        raise Unproven("padding of the sharded dim")
    return [dim]


def _triangle(call: Applied) -> Sequence[int | None]:
    tensor, dim = call.only()
    if dim >= tensor.dim() - 2:
        raise Unproven(f"{call.name} of the sharded dim")
    return [dim]


def _normed(call: Applied) -> Sequence[int | None]:
    x = call.get(0, "input")
    dim = call.dim_of(x)
    if dim is None or dim >= x.dim() - len(call.get(1, "normalized_shape")):
        raise Unproven(f"{call.name} over the sharded dim")
    return [dim]


def _rules(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, Rule] = {
    **_rules(_reshaped, "reshape view flatten unflatten squeeze unsqueeze contiguous"),
    **_rules(_permuted, "permute transpose movedim moveaxis __get__"),
    **_rules(_at(1), "softmax log_softmax cumsum cumprod flip"),
    **_rules(_at(1, default=-1), "sort argsort normalize glu"),
    **_rules(_at(2, default=-1), "topk roll"),
    **_rules(_at(1), "narrow index_select"),
    **_rules(
        _reduced,
        "sum mean amax amin max min prod any all var std var_mean logsumexp argmax argmin",
    ),
    **_rules(_einsum, "einsum"),
    **_rules(_matmul, "matmul bmm"),
    **_rules(_linear, "linear"),
    **_rules(_attention, "scaled_dot_product_attention"),
    **_rules(_indexed, "__getitem__"),
    **_rules(_pieces, "split chunk tensor_split"),
    **_rules(_unbound, "unbind select"),
    **_rules(_concatenated, "cat concatenate stack"),
    **_rules(_repeated, "repeat_interleave"),
    **_rules(_expanded, "expand broadcast_to"),
    **_rules(_padded, "pad"),
    **_rules(_triangle, "tril triu"),
    **_rules(_normed, "layer_norm rms_norm"),
    **_rules(elementwise, "to float double clone detach where masked_fill"),
}

# What they give is the same all along a dim that they make.
UNIFORM = {"expand", "broadcast_to", "ones", "zeros", "full", "empty"}

# Their sizes may differ between a rank and the whole: the shapes of what they give are compared.
SIZED = {*("reshape", "view", "flatten", "unflatten"), *UNIFORM}
