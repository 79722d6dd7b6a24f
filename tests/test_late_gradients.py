"""Kernels' gradients, computed while their input's travels, against one process, in float64.

Seen to fail, in keras_tp/late_gradients.py: the sum finished before the products ("meanwhile"),
`grad.clone()` left out ("others hold"), what products leave not told apart by passes ("each other
nothing"), `before` left out ("whoever reads"), products that leave their factors with grad mode on
and `_Read` that does not look at it ("as by autograd"), `.to` left out ("stored dtype"); in
keras_tp/region_calls.py, `SharedCopies` told of no readers ("together").
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import keras
import models
import parity
import pytest
import torch
from counting import Collectives
from test_row_collectives import axis_of, far, random

import keras_tp
from keras_tp import late_gradients
from keras_tp.collectives import Axis, gather
from keras_tp.computations import Contraction
from keras_tp.late_gradients import Reading
from keras_tp.products import contract

CLOSE = 1e-12  # sums in another order


def einsum(equation: str) -> Contraction:
    factors, output = equation.split("->")
    return Contraction(*factors.split(","), output, "", equation, ("kernel",))


DENSE = Contraction("...x", "xy", "...y", "", "", ("kernel",))
# The computation, its shapes, and the dim of the kernel and of the output that is cut.
PRODUCTS: list[tuple[Contraction, tuple[int, ...], tuple[int, ...], int, int]] = [
    (DENSE, (3, 5, 4), (4, 6), 1, -1),
    (DENSE, (4,), (4, 6), 1, -1),
    (DENSE, (3, 0, 4), (4, 6), 1, -1),
    (einsum("abc,cde->abde"), (3, 5, 4), (4, 6, 2), 1, 2),
    (einsum("...c,cd->...d"), (3, 5, 4), (4, 6), 1, -1),
    (einsum("abcd,cde->eab"), (3, 5, 4, 2), (4, 2, 6), 2, 0),
    (einsum("abc,dc->adb"), (3, 5, 4), (6, 4), 0, 1),
    (einsum("acb,cd->abd"), (3, 4, 5), (4, 6), 1, 2),
]


def part(full: torch.Tensor, dim: int, axis: Axis) -> torch.Tensor:
    count = full.shape[dim] // axis.size
    return full.narrow(dim, axis.rank * count, count).clone().requires_grad_()


def both(
    axis: Axis, computation: Contraction, shape: Any, kernel_shape: Any, dim: int, out: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Output, gradients and gradients of those, of the whole and of this rank's columns."""
    full, source = random(*kernel_shape), random(*shape)

    def values(x: Any, kernel: Any, times: Callable[[Any, Any], Any]) -> list[torch.Tensor]:
        y = times(x * 1.5, kernel)
        loss = torch.sin(y).sum()
        grads = torch.autograd.grad(loss, (x, kernel), create_graph=True)
        # (That of the kernel is this rank's own: it is left out, as a square would be summed.)
        twice = torch.autograd.grad((grads[0] ** 2).sum(), (x, kernel))
        late = torch.autograd.grad(torch.sin(times(x * 1.5, kernel)).sum(), (x, kernel))
        return [y, *grads, *twice, *late]

    def sharded(x: Any, kernel: Any) -> Any:
        reading = Reading(x, {"": kernel}, axis)
        y = reading.times("", reading.kernels[""], None, computation)
        return gather(y, out % y.dim(), full.shape[dim], axis)

    whole = full.clone().requires_grad_()
    one = values(
        source.clone().requires_grad_(),
        whole,
        lambda x, k: contract(x, k, None, computation),
    )
    many = values(source.clone().requires_grad_(), part(full, dim, axis), sharded)
    kernels = [2, 4, 6]
    one = [part(t.detach(), dim, axis) if i in kernels else t for i, t in enumerate(one)]
    return one, many


def products() -> list[float]:
    axis = axis_of(2)
    return [max(map(far, *both(axis, *case))) for case in PRODUCTS]


def test_gradients_are_as_by_autograd(ranks: Any) -> None:
    """A label summed where it should not be, a gradient of gradients that is not followed."""
    for found in ranks(2)(products):
        assert max(found) < CLOSE, found


def several() -> dict[str, float]:
    axis = axis_of(2)
    source, full = random(3, 4), random(4, 6)
    own = part(full, 1, axis)
    worst: dict[str, float] = {}

    def compare(name: str, loss: Callable[[Any, Any, Any], Any]) -> None:
        """`loss` of x, of the kernel, and of a function that multiplies them."""
        x, kernel = source.clone().requires_grad_(), full.clone().requires_grad_()
        one = torch.autograd.grad(loss(x, lambda made, k=kernel: made @ k, kernel), (x, kernel))
        x = source.clone().requires_grad_()
        reading = Reading(x, {"first": own, "second": own}, axis)

        def times(made: Any, reader: str = "first") -> Any:
            assert made is x
            y = reading.times(reader, reading.kernels[reader], None, DENSE)
            return gather(y, 1, 6, axis)

        found = loss(x, times, reading)
        with Collectives() as counts:
            many = torch.autograd.grad(found, (x, own), retain_graph=True)
            again = torch.autograd.grad(found, (x, own), retain_graph=True)
            (alone,) = torch.autograd.grad(found, (own,))
        assert counts["all_reduce"] == 3, counts
        wanted = one[0], part(one[1], 1, axis)
        ours = (*zip(many, wanted, strict=True), *zip(again, wanted, strict=True))
        worst[name] = max(far(a, b) for a, b in (*ours, (alone, wanted[1])))

    compare("once", lambda x, times, _: (times(x) ** 2).sum())
    compare("twice", lambda x, times, _: (times(x).sin() * times(x)).sum())

    def other(x: Any, times: Any, made: Any) -> Any:
        # What each rank computes of it is half of what one process does.
        read = (made.copy**2).sum() / 2 if isinstance(made, Reading) else (x**2).sum()
        return (times(x) ** 2).sum() + read

    compare("another reader", other)

    def otherwise(x: Any, times: Any, made: Any) -> Any:
        kernel = made.kernels["first"] if isinstance(made, Reading) else made
        return (times(x) ** 2).sum() + (kernel**2).sum()  # of columns, for which it is the same

    compare("also reached otherwise", otherwise)
    return worst


def test_whoever_reads_and_however_often_backward_runs(ranks: Any) -> None:
    """A second backward that adds what the first has left, a gradient summed under another reader
    that holds it, one that reaches the kernel past the product and is lost.
    """
    for worst in ranks(2)(several):
        assert max(worst.values()) < CLOSE, worst


def beside() -> float:
    axis = axis_of(2)
    x, own = random(3, 4).requires_grad_(), part(random(4, 6), 1, axis)
    other = random(3, 4).requires_grad_()
    added = Reading(x, {"": own}, axis).copy + other
    loss = (added**2).sum() / 2
    (found,) = torch.autograd.grad(loss, other, retain_graph=True)
    (again, _) = torch.autograd.grad(loss, (other, x))
    return max(far(found, added), far(again, added))


def test_a_gradient_that_others_hold_is_left_alone(ranks: Any) -> None:
    """An addition gives both its summands one gradient, and one of them sums it in place."""
    assert max(ranks(2)(beside)) < CLOSE


class Fails(torch.autograd.Function):
    """Raises in its first backward."""

    failed = False

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        if not Fails.failed:
            Fails.failed = True
            raise RuntimeError("once")
        return grad


def after_others(fails: bool) -> float:
    """How far the gradient is that one of two readers gives after a pass of both."""
    axis = axis_of(2)
    x, own = random(3, 4).requires_grad_(), part(random(4, 6), 1, axis)
    reading = Reading(x, {"a": own, "b": own}, axis)
    Fails.failed = not fails
    # Of the two products the younger has run when the other's output raises.
    first = Fails.apply(reading.times("a", reading.kernels["a"], None, DENSE))
    second = reading.times("b", reading.kernels["b"], None, DENSE)
    both = (first * 2 + second).sum()
    with pytest.raises(RuntimeError, match="once") if fails else contextlib.nullcontext():
        torch.autograd.grad(both, own, retain_graph=True)
    (found,) = torch.autograd.grad(first.sum(), own)
    (wanted,) = torch.autograd.grad((x @ own).sum(), own)
    return far(found, wanted)


@pytest.mark.parametrize("fails", [False, True])
def test_passes_leave_each_other_nothing(ranks: Any, fails: bool) -> None:
    """What a product left in a pass of both readers, or in one that raised, added later."""
    assert max(ranks(2)(after_others, fails)) < CLOSE


def cast() -> tuple[torch.dtype, float]:
    axis = axis_of(2)
    x, own = random(3, 4).bfloat16().requires_grad_(), part(random(4, 6).float(), 1, axis)
    reading = Reading(x, {"": own}, axis)
    y = reading.times("", reading.kernels[""].bfloat16(), None, DENSE)
    (found,) = torch.autograd.grad(y.sum(), own)
    (wanted,) = torch.autograd.grad((x @ own.bfloat16()).sum(), own)
    return found.dtype, far(found, wanted)


def test_a_kernel_that_was_cast_has_a_gradient_of_the_stored_dtype(ranks: Any) -> None:
    """In `mixed_bfloat16` an optimizer that is given bfloat16 for a float32 weight."""
    for dtype, worst in ranks(2)(cast):
        assert dtype == torch.float32
        assert worst == 0.0


def recorded_step() -> list[str]:
    """What happens in one backward of a transformer, in order."""
    events: list[str] = []

    def noted(name: str, function: Callable[..., Any]) -> Any:
        def call(*args: Any) -> Any:
            events.append(name)
            return function(*args)

        return mock.patch.object(late_gradients, function.__name__, call)

    mesh = keras_tp.device_mesh({"model": 2})
    model = parity.build_seeded(models.transformer)
    keras_tp.parallelize(model, parity.layout_map(models.TRANSFORMER_LAYOUT, mesh))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x, y = models.transformer_data()
    model.train_on_batch(x, y)
    begin, learn, end = (
        noted("begin", late_gradients.begin_sum),
        noted("kernel", late_gradients.of_kernel),
        noted("end", late_gradients.finish),
    )
    with begin, learn, end:
        model.train_on_batch(x, y)
    return events


def test_kernels_are_learnt_together_meanwhile(ranks: Any) -> None:
    """An all-reduce that nothing runs beside, or one for each of query, key and value."""
    for events in ranks(2)(recorded_step):
        head = ["begin", "kernel", "end"]
        up = ["begin", "kernel", "end"]
        attention = ["begin", "kernel", "kernel", "kernel", "end"]
        assert events == [*head, *up, *attention, *up, *attention]
