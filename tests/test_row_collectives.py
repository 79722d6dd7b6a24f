"""Communication between ranks that compute different rows, against one process, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from counting import Collectives

import keras_tp
from keras_tp.collectives import Axis
from keras_tp.layouts import chunk_bounds
from keras_tp.row_collectives import gather_rows, gather_weight, split_rows, sum_over

CLOSE = 1e-12  # sums in another order; everything else is exact


def axis_of(size: int) -> Axis:
    from keras_tp.layouts import MeshShape
    from keras_tp.mesh import torch_mesh

    shape = MeshShape.from_keras(keras_tp.device_mesh({"batch": size}))
    # In another order than the group's, as a mesh may have its ranks.
    turned = MeshShape(shape.axes, shape.sizes, shape.ranks[::-1])
    return Axis.of(torch_mesh(turned), "batch")


def random(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def far(one: Any, other: Any) -> float:
    assert one.shape == other.shape, (one.shape, other.shape)
    return float((one - other).detach().abs().max()) if one.numel() else 0.0


def first_and_second(loss: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient, and the gradient of its square."""
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    (twice,) = torch.autograd.grad((grad**2).sum(), x)
    return grad.detach(), twice


def sums(size: int) -> float:
    axis = axis_of(size)
    full = random(3 * size, 4)
    rows = slice(3 * axis.rank, 3 * axis.rank + 3)

    def normalized(x: Any, total: Any) -> Any:
        mean = total(x.sum(0)) / (3 * size)
        return (x - mean) / (total(((x - mean) ** 2).sum(0)) + 1).sqrt()

    whole = full.clone().requires_grad_()
    one = normalized(whole, lambda t: t)
    mine = full[rows].clone().requires_grad_()
    part = normalized(mine, lambda t: sum_over(t, axis))
    # The loss is the whole batch's on every rank: joined, then used by all alike.
    joined = gather_rows(part, (3,) * size, axis)
    a, b = first_and_second((one**3).sum(), whole)
    (grad,) = torch.autograd.grad((joined**3).sum(), mine, create_graph=True)
    # As the rows of this gradient are each rank's own, so is a loss of them, until joined.
    squares = (gather_rows(grad, (3,) * size, axis) ** 2).sum()
    (twice,) = torch.autograd.grad(squares, mine)
    return max(far(joined, one), far(grad, a[rows]), far(twice, b[rows]))


@pytest.mark.parametrize("size", [2, 4])
def test_a_total_has_the_gradient_of_all_rows(ranks: Any, size: int) -> None:
    """With `reduce`, whose gradient is not summed, a batch norm learns from its own rows alone."""
    assert max(ranks(size)(sums, size)) < CLOSE


def weights(size: int, total: int, dim: int) -> float:
    axis = axis_of(size)
    shape = [3, 5, 4]
    shape[dim] = total
    full, x = random(*shape), random(2 * size, *shape)
    start, count = chunk_bounds(total, size, axis.rank)

    def outputs(weight: Any, x: Any) -> Any:
        return (weight * x).tanh() * weight

    whole = full.clone().requires_grad_()
    one = outputs(whole, x)
    mine = full.narrow(dim, start, count).clone().requires_grad_()
    rows = split_rows(x, (2,) * size, axis)
    part = outputs(gather_weight(mine, dim - 3, total, axis), rows)
    joined = gather_rows(part, (2,) * size, axis)
    a, b = first_and_second((one**2).sum(), whole)
    with Collectives() as counts:
        (grad,) = torch.autograd.grad((joined**2).sum(), mine, create_graph=True)
    assert counts == {"reduce_scatter": 1}, counts
    # Each rank's square is of its own chunk, on no other rank: the sum over ranks is the whole.
    (twice,) = torch.autograd.grad((grad**2).sum(), mine)
    ours = [t.narrow(dim, start, count) for t in (a, b)]
    return max(far(joined, one), far(grad, ours[0]), far(twice, ours[1]))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("total", [8, 7, 5, 1])
def test_a_gathered_weight_gets_the_sum_of_the_replicas_gradients(
    ranks: Any, size: int, dim: int, total: int
) -> None:
    """With `gather`, whose gradient is sliced, each chunk learns from one replica's rows.

    Of 4 chunks of 5 the last is empty, of 1 all but the first.
    """
    assert max(ranks(size)(weights, size, total, dim)) < CLOSE


def rows(size: int, sizes: tuple[int, ...]) -> float:
    axis = axis_of(size)
    full = random(sum(sizes), 3)
    start = sum(sizes[: axis.rank])
    own = slice(start, start + sizes[axis.rank])
    worst = 0.0

    def whole(x: Any) -> Any:
        return (x.tanh() ** 3).sum()

    x = full.clone().requires_grad_()
    a, b = first_and_second(whole(x), x)
    mine = full[own].clone().requires_grad_()
    joined = gather_rows(mine, sizes, axis)
    worst = max(worst, far(joined, full))
    (grad,) = torch.autograd.grad(whole(joined), mine, create_graph=True)
    (twice,) = torch.autograd.grad((gather_rows(grad, sizes, axis) ** 2).sum(), mine)
    worst = max(worst, far(grad, a[own]), far(twice, b[own]))

    x = full.clone().requires_grad_()
    part = split_rows(x, sizes, axis)
    worst = max(worst, far(part, full[own]))
    shared = gather_rows(part.tanh() ** 3, sizes, axis).sum()
    grad, twice = first_and_second(shared, x)
    return max(worst, far(grad, a), far(twice, b))


@pytest.mark.parametrize(
    ("size", "sizes"),
    [
        (2, (3, 3)),
        (2, (2, 3)),
        (2, (0, 3)),
        (2, (3, 0)),
        (2, (0, 0)),
        (4, (1, 5, 0, 2)),
        (4, (2, 2, 1, 1)),
    ],
)
def test_rows_of_any_counts(ranks: Any, size: int, sizes: tuple[int, ...]) -> None:
    """Cut by `chunk_bounds`, or padded to the first one's count, other counts lose rows."""
    assert max(ranks(size)(rows, size, sizes)) < CLOSE


def dtypes() -> list[str]:
    axis = axis_of(2)
    wrong = []
    names = ["bool", "int16", "int64", "float16", "bfloat16", "float32", "complex64", "complex128"]
    for name in names:
        full = (torch.arange(15).reshape(5, 3) % 7).to(getattr(torch, name))
        mine = split_rows(full, (2, 3), axis)
        if not torch.equal(gather_rows(mine, (2, 3), axis), full):
            wrong.append(f"rows {name}")
        if not torch.equal(gather_weight(split_rows(full, (3, 2), axis), 0, 5, axis), full):
            wrong.append(f"weight {name}")
        if name.startswith(("float", "bfloat", "complex")):
            weight = split_rows(full, (3, 2), axis).requires_grad_()
            gather_weight(weight, 0, 5, axis).abs().sum().backward()
            if not torch.equal(weight.grad, 2 * weight.detach().sgn()):  # type: ignore[arg-type]
                wrong.append(f"gradient {name}")
            if not torch.equal(sum_over(full, axis), 2 * full):
                wrong.append(f"sum {name}")
    return wrong


def test_every_dtype(ranks: Any) -> None:
    """What gloo cannot carry must go as bytes; what it can must be summed as numbers."""
    assert ranks(2)(dtypes) == [[], []]


def alone() -> bool:
    axis = Axis("batch", "none", (0,), 0)
    x = random(4, 2)
    results = [
        sum_over(x, axis),
        gather_weight(x, 0, 4, axis),
        gather_rows(x, (4,), axis),
        split_rows(x, (4,), axis),
    ]
    return all(result is x for result in results)


def test_one_rank_costs_nothing() -> None:
    """A job of one process has no group to ask."""
    assert alone()
