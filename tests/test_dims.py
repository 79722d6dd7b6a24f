"""What is said of a function on shards is what it does on shards: on values, for every rule.

The bug that this catches: a rule that lets a shard through where ranks needed each other's parts.
With each of these rules made to let everything through, tests failed: `_at`, `_reduced`,
`_reshaped`, `_einsum`, `_attention`, `_indexed`, `_pieces`, `_unbound`, `_concatenated`,
`_repeated`, `_triangle`. Of the others the shapes tell, which are compared whatever a rule says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_tp.dims import RULES
from keras_tp.dry_runs import LostTrack, Whole
from keras_tp.flows import Flow, tensors_in
from keras_tp.shard_runs import Local

Function = Callable[..., Any]


def followed(function: Function, full: list[torch.Tensor], dims: list[int | None], parts: int):
    """The dim of each output along which it is said to be cut; None if it is not known."""

    def metas(cut: bool) -> list[torch.Tensor]:
        shapes = [list(t.shape) for t in full]
        for shape, dim in zip(shapes, dims, strict=True):
            if dim is not None and cut:
                shape[dim] //= parts
        return [
            torch.empty(s, dtype=t.dtype, device="meta") for s, t in zip(shapes, full, strict=True)
        ]

    whole = Whole()
    given = metas(False)
    for tensor in given:
        whole.numbers.of(tensor)
    with whole:
        function(*given)
    local = Local(whole.events, parts)
    given = metas(True)
    for number, (tensor, dim) in enumerate(zip(given, dims, strict=True)):
        origins = frozenset([number]) if dim is not None else frozenset()
        local.set_flow(tensor, Flow(dim, grad=dim is not None, origins=origins, weights=None))
    try:
        with local:
            result = function(*given)
    except LostTrack:
        return None
    if local.refused:
        return None
    return [local.flow_of(t).dim for t in tensors_in(result)]


def check(function: Function, full: list[torch.Tensor], dims: list[int | None], parts: int) -> Any:
    """Follows the function; where that has an answer, it is what the function does."""
    found = followed(function, full, dims, parts)
    if found is None:
        return None
    wanted = tensors_in(function(*full))
    each = []
    for rank in range(parts):
        shards = [
            t if d is None else t.chunk(parts, d)[rank].contiguous()
            for t, d in zip(full, dims, strict=True)
        ]
        each.append(tensors_in(function(*shards)))
    for i, (dim, whole) in enumerate(zip(found, wanted, strict=True)):
        mine = [outputs[i] for outputs in each]
        if dim is None:
            for part in mine:
                torch.testing.assert_close(part, whole, rtol=1e-12, atol=1e-12)
        else:
            torch.testing.assert_close(torch.cat(mine, dim), whole, rtol=1e-12, atol=1e-12)
    return found


def two_sizes(size: int) -> tuple[int, int]:
    small = next(n for n in (2, 3, 1) if size % n == 0)
    return small, size // small


# Functions of one tensor and one of its dims; all are tried with the shard along every dim.
ONE: dict[str, Function] = {
    "relu": lambda x, d: torch.relu(x),
    "gelu": lambda x, d: F.gelu(x),
    "silu": lambda x, d: F.silu(x) * 2 + 1,
    "masked_fill": lambda x, d: x.masked_fill(x > 0, 0.0),
    "detach": lambda x, d: x.detach().float().double(),
    "cumprod": lambda x, d: torch.cumprod(x, d),
    "amin": lambda x, d: torch.amin(x, d),
    "min": lambda x, d: torch.min(x, d),
    "prod": lambda x, d: torch.prod(x, d),
    "any": lambda x, d: torch.any(x > 1, d),
    "all": lambda x, d: torch.all(x > -1, d),
    "std": lambda x, d: torch.std(x, d, correction=0),
    "var_mean": lambda x, d: torch.var_mean(x, d, correction=0),
    "argmin": lambda x, d: torch.argmin(x, d),
    "moveaxis": lambda x, d: torch.moveaxis(x, d, 0),
    "broadcast_to": lambda x, d: torch.broadcast_to(x[None], (2, *x.shape)),
    "view": lambda x, d: x.contiguous().view(*x.shape[:d], -1),
    "tensor_split": lambda x, d: torch.tensor_split(x, 2, d),
    "concatenate": lambda x, d: torch.concatenate([x, x], d),
    "triu": lambda x, d: torch.triu(x) if x.dim() > 1 else x,
    "rms_norm": lambda x, d: F.rms_norm(x, x.shape[d:]),
    "linear": lambda x, d: F.linear(x, torch.ones(3, x.shape[-1], device=x.device).to(x.dtype)),
    "bmm": lambda x, d: torch.bmm(x, x.mT) if x.dim() == 3 else x,
    "where": lambda x, d: torch.where(x > 0, x, 0.0),
    "clip": lambda x, d: torch.clip(x, -0.5, 0.5),
    "in place": lambda x, d: x.clone().mul_(2).add_(1),
    "to": lambda x, d: x.to(torch.float32).to(torch.float64),
    "softmax": lambda x, d: torch.softmax(x, d),
    "F.softmax": lambda x, d: F.softmax(x, dim=d),
    "log_softmax": lambda x, d: F.log_softmax(x, d),
    "logsumexp": lambda x, d: torch.logsumexp(x, d),
    "cumsum": lambda x, d: torch.cumsum(x, d),
    "sort": lambda x, d: torch.sort(x, d),
    "argsort": lambda x, d: torch.argsort(x, d),
    "topk": lambda x, d: torch.topk(x, 1, d),
    "flip": lambda x, d: torch.flip(x, (d,)),
    "roll": lambda x, d: torch.roll(x, 1, d),
    "sum": lambda x, d: x.sum(d),
    "sum, kept": lambda x, d: x.sum(d, keepdim=True),
    "sum of all": lambda x, d: x.sum(),
    "mean of two": lambda x, d: x.mean((0, d)) if d else x.mean(0),
    "amax": lambda x, d: torch.amax(x, d),
    "max": lambda x, d: torch.max(x, d),
    "argmax": lambda x, d: torch.argmax(x, d),
    "var": lambda x, d: torch.var(x, d, correction=0),
    "norm": lambda x, d: torch.linalg.vector_norm(x, dim=d),
    "normalize": lambda x, d: F.normalize(x, dim=d),
    "transpose": lambda x, d: x.transpose(0, d),
    "permute": lambda x, d: x.permute(*range(1, x.dim()), 0),
    "movedim": lambda x, d: torch.movedim(x, 0, d),
    "T": lambda x, d: x.mT if x.dim() > 1 else x,
    "unsqueeze": lambda x, d: x.unsqueeze(d),
    "squeeze": lambda x, d: x.squeeze(d),
    "flatten": lambda x, d: x.flatten(),
    "flatten from": lambda x, d: x.flatten(d),
    "merge": lambda x, d: x.reshape(*x.shape[:d], -1),
    "unflatten": lambda x, d: x.unflatten(d, two_sizes(x.shape[d])),
    "split off": lambda x, d: x.reshape(*x.shape[:d], -1, 2, *x.shape[d + 1 :]),
    "split in front": lambda x, d: x.reshape(*x.shape[:d], 2, -1, *x.shape[d + 1 :]),
    "contiguous": lambda x, d: x.transpose(0, d).contiguous().reshape(-1, 2),
    "expand": lambda x, d: x.unsqueeze(0).expand(3, *x.shape),
    "repeat_interleave": lambda x, d: torch.repeat_interleave(x, 2, d),
    "repeat_interleave of all": lambda x, d: torch.repeat_interleave(x, 2),
    "repeat": lambda x, d: x.repeat(*[2] * x.dim()),
    "tile": lambda x, d: torch.tile(x, (2,)),
    "index": lambda x, d: x[(slice(None),) * d + (0,)],
    "slice": lambda x, d: x[(slice(None),) * d + (slice(0, 1),)],
    "new dim": lambda x, d: x[..., None, :],
    "last": lambda x, d: x[..., -1],
    "narrow": lambda x, d: x.narrow(d, 0, 1),
    "select": lambda x, d: x.select(d, 0),
    "unbind": lambda x, d: torch.unbind(x, d),
    "chunk": lambda x, d: torch.chunk(x, 2, d),
    "split": lambda x, d: torch.split(x, 1, d),
    "cat with itself": lambda x, d: torch.cat([x, x * 2], d),
    "stack with itself": lambda x, d: torch.stack([x, x * 2], d),
    "index_select": lambda x, d: torch.index_select(x, d, torch.tensor([0], device=x.device)),
    "pad": lambda x, d: F.pad(x, (1, 0)),
    "pad before": lambda x, d: F.pad(x, [0, 0] * (x.dim() - 1 - d) + [0, 1]),
    "tril": lambda x, d: torch.tril(x) if x.dim() > 1 else x,
    "layer_norm": lambda x, d: F.layer_norm(x, x.shape[d:]),
    "glu": lambda x, d: F.glu(torch.cat([x, x], d), d),
    "zeros_like": lambda x, d: x + torch.ones_like(x),
    "matmul with itself": lambda x, d: x @ x.mT if x.dim() > 1 else x,
    "gram": lambda x, d: x.mT @ x if x.dim() > 1 else x,
    "a scalar of its size": lambda x, d: x / x.shape[d],
    "ones of its size": lambda x, d: x * torch.ones(x.shape, device=x.device, dtype=x.dtype),
    "count of its size": lambda x, d: x + torch.arange(x.shape[-1], device=x.device),
    "outer": lambda x, d: torch.einsum("...a,...b->...ab", x, x),
    "inner": lambda x, d: torch.einsum("...a,...a->...", x, x),
}
SHAPES = [(4,), (6, 4), (4, 2, 6), (1, 4, 2), (2, 6, 4, 2)]


@pytest.mark.parametrize("name", ONE)
@pytest.mark.filterwarnings("ignore:The use of `x.T`")
def test_of_one_tensor(name: str) -> None:
    """Every shape, every sharded dim, every dim that is worked on, two and four ranks."""
    function = ONE[name]
    tried = 0
    for shape in SHAPES:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        for cut in range(len(shape)):
            for parts in (2, 4):
                if shape[cut] % parts:
                    continue
                for d in range(len(shape)):
                    try:
                        function(x, d)
                    except (RuntimeError, IndexError):
                        continue  # not for this shape
                    tried += 1
                    check(lambda t, d=d: function(t, d), [x], [cut], parts)
    assert tried > 5


# What must be known, or transformers would be gathered: function, shapes, sharded dims, answer.
KNOWN: dict[str, tuple[Function, list[tuple[int, ...]], list[int | None], list[int | None]]] = {
    "gelu": (F.gelu, [(2, 3, 8)], [2], [2]),
    "softmax of scores": (lambda x: torch.softmax(x, -1), [(2, 4, 3, 3)], [1], [1]),
    "heads merged": (lambda x: x.reshape(2, 3, -1), [(2, 3, 4, 5)], [2], [2]),
    "heads split": (lambda x: x.reshape(2, 3, -1, 5), [(2, 3, 20)], [2], [2]),
    "heads before tokens": (lambda x: x.transpose(1, 2), [(2, 3, 4, 5)], [2], [1]),
    "keys repeated": (lambda x: torch.repeat_interleave(x, 2, 2), [(2, 3, 4, 5)], [2], [2]),
    "gate": (lambda a, b: F.silu(a) * b, [(2, 3, 8), (2, 3, 8)], [2, 2], [2]),
    "scores": (
        lambda q, k: torch.einsum("aecd,abcd->acbe", q, k),
        [(2, 3, 4, 5), (2, 3, 4, 5)],
        [2, 2],
        [1],
    ),
    "mask": (
        lambda s, m: torch.where(m > 0, s, -9.0),
        [(2, 4, 3, 3), (2, 1, 3, 3)],
        [1, None],
        [1],
    ),
    "attention": (
        F.scaled_dot_product_attention,
        [(2, 4, 3, 5), (2, 4, 3, 5), (2, 4, 3, 5)],
        [1, 1, 1],
        [1],
    ),
    "matmul of heads": (lambda a, b: a @ b, [(2, 4, 3, 5), (2, 4, 5, 3)], [1, 1], [1]),
    "norm of heads": (lambda x: F.rms_norm(x, (5,)), [(2, 3, 4, 5)], [2], [2]),
    "rotated halves": (
        lambda x: torch.cat([-x[..., 2:], x[..., :2]], -1),
        [(2, 3, 4, 4)],
        [2],
        [2],
    ),
}


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("parts", [2, 4])
def test_what_transformers_need_is_known(name: str, parts: int) -> None:
    """A rule that says no to everything is right, and slow. One head a rank breaks first."""
    function, shapes, dims, wanted = KNOWN[name]
    random = torch.Generator().manual_seed(2)
    full = [torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes]
    assert check(function, full, dims, parts) == wanted


# What must not be known, of two tensors.
MIXED: dict[str, tuple[Function, list[tuple[int, ...]], list[int | None]]] = {
    "a bias for each head": (torch.add, [(2, 4, 3), (1, 4, 1)], [1, None]),
    "shards along two dims": (torch.add, [(4, 4), (4, 4)], [0, 1]),
    "a contraction": (torch.matmul, [(3, 4), (4, 5)], [1, 0]),
    "whole keys": (torch.matmul, [(4, 3, 5), (4, 5, 3)], [0, None]),
    "attention with whole keys": (
        lambda q, k: F.scaled_dot_product_attention(q, k, k),
        [(2, 4, 3, 5), (2, 4, 3, 5)],
        [1, None],
    ),
    "attention over shards": (
        lambda q, k: F.scaled_dot_product_attention(q, k, k),
        [(2, 4, 4, 5), (2, 4, 4, 5)],
        [2, 2],
    ),
    "joined with a whole": (lambda a, b: torch.cat([a, b], 0), [(2, 4), (2, 4)], [1, None]),
    "rows by whole ids": (lambda x, i: x[i.long() % 2], [(4, 3), (5,)], [0, None]),
    "dropout": (lambda x, y: torch.nn.functional.dropout(x, 0.5), [(4, 4), (1,)], [1, None]),
}


@pytest.mark.parametrize("name", MIXED)
def test_what_mixes_parts_is_not_known(name: str) -> None:
    """Two ranks would give each other's parts; with one entry each some shapes fit by accident."""
    function, shapes, dims = MIXED[name]
    full = [torch.ones(shape, dtype=torch.float64) for shape in shapes]
    for parts in (2, 4):
        assert followed(function, full, dims, parts) is None


LABELS = "abcd"


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_products_of_any_labels(data: Any) -> None:
    """Any einsum of two, shards along any label of either."""
    sizes = {label: data.draw(st.sampled_from([2, 4, 3, 1])) for label in LABELS}
    terms = [
        "".join(data.draw(st.lists(st.sampled_from(LABELS), min_size=1, max_size=4, unique=True)))
        for _ in range(2)
    ]
    used = sorted(set(terms[0]) | set(terms[1]))
    output = "".join(data.draw(st.lists(st.sampled_from(used), max_size=4, unique=True)))
    random = torch.Generator().manual_seed(3)
    full = [
        torch.randn([sizes[x] for x in term], generator=random, dtype=torch.float64)
        for term in terms
    ]
    dims: list[int | None] = []
    for term in terms:
        cuttable = [i for i, label in enumerate(term) if sizes[label] % 2 == 0]
        dims.append(data.draw(st.sampled_from([None, *cuttable])))
    equation = f"{terms[0]},{terms[1]}->{output}"
    check(lambda a, b: torch.einsum(equation, a, b), full, dims, 2)


def test_every_rule_is_looked_at() -> None:
    """A rule that no test calls may say anything."""
    called: set[str] = set()
    for function in ONE.values():
        for shape in SHAPES:
            for d in range(len(shape)):
                whole = Whole()
                try:
                    with whole:
                        function(torch.empty(shape, device="meta", dtype=torch.float64), d)
                except (RuntimeError, IndexError):
                    continue
                called |= {event.name for event in whole.events}
    for function, shapes, *_ in [*KNOWN.values(), *MIXED.values()]:
        whole = Whole()
        with whole:
            function(*(torch.empty(s, device="meta", dtype=torch.float64) for s in shapes))
        called |= {event.name for event in whole.events}
    assert set(RULES) - called == set(), sorted(set(RULES) - called)
