"""Bucketed gradients on real ranks, each its own rows, against one process, in float64."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from counting import Collectives
from patience import soon
from torch.utils.checkpoint import checkpoint

import keras_tp
from keras_tp.buckets import Buckets, summed
from keras_tp.collectives import Axis
from keras_tp.row_collectives import gather_rows, split_rows

CLOSE = 1e-12  # sums over rows in another order
SMALL = 256, 1024  # bytes, for several buckets of small weights

Weights = list[torch.Tensor]
Model = Callable[[Weights, torch.Tensor], torch.Tensor]


def axis_of(size: int) -> Axis:
    from keras_tp.layouts import MeshShape
    from keras_tp.mesh import torch_mesh

    mesh = torch_mesh(MeshShape.from_keras(keras_tp.device_mesh({"batch": size})))
    return Axis.of(mesh, "batch")


def random(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator) / 3


def make_weights(layers: int = 6, width: int = 8) -> Weights:
    """Kernels, every other of them stored transposed, and biases; one is empty."""
    made = []
    for index in range(layers):
        kernel = random(width, width) + index / 10
        made += [kernel.T.contiguous().T if index % 2 else kernel, random(width) + index]
    return [torch.nn.Parameter(w) for w in [*made, random(0, 3)]]


def mlp(w: Weights, x: torch.Tensor) -> torch.Tensor:
    for kernel, bias in zip(w[:-1:2], w[1::2], strict=True):
        x = (x @ kernel + bias).tanh()
    return x + w[-1].sum()


class Replica:
    """The same weights twice: as one process has them, and as replicas read them."""

    def __init__(self, size: int, weights: Callable[[], Weights] = make_weights):
        self.axis, self.size = axis_of(size), size
        self.one, self.mine = weights(), weights()
        self.x = random(4 * size, 8)
        self.counts = (4,) * size

    def call(self, model: Model, limits: Sequence[int] = SMALL) -> torch.Tensor:
        """The whole batch's outputs, from this rank's rows of it."""
        buckets = Buckets(self.mine, self.axis, *limits)
        read = [summed(w, self.axis, buckets) for w in self.mine]
        part = model(read, split_rows(self.x, self.counts, self.axis))
        return gather_rows(part, self.counts, self.axis)

    def lazy(self, model: Callable[..., torch.Tensor], limits: Sequence[int] = SMALL) -> Any:
        """As `call`, of a model that reads each weight when it uses it."""
        buckets = Buckets(self.mine, self.axis, *limits)

        def read(w: torch.Tensor) -> torch.Tensor:
            return summed(w, self.axis, buckets)

        part = model(self.mine, split_rows(self.x, self.counts, self.axis), read)
        return gather_rows(part, self.counts, self.axis)

    def difference(self) -> float:
        """Largest difference of a gradient; infinite if one is there and the other is not."""
        return apart([w.grad for w in self.one], [w.grad for w in self.mine])


def apart(one: Sequence[Any], other: Sequence[Any]) -> float:
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        if (a is None) != (b is None):
            return float("inf")
        if a is not None and a.numel():
            worst = max(worst, float((a - b).detach().abs().max()))
    return worst


def loss_of(out: torch.Tensor) -> torch.Tensor:
    return (out**2).mean() + out.sum().sin()


def plainly(size: int) -> float:
    replica = Replica(size)
    loss_of(mlp(replica.one, replica.x)).backward()
    loss_of(replica.call(mlp)).backward()
    # In the layout of their weights, and in the buckets' memory, not copied out of it.
    for w in replica.mine:
        assert w.grad is not None
        assert w.grad.stride() == w.stride() or w.numel() == 0, (w.grad.stride(), w.stride())
        assert w.grad.untyped_storage().nbytes() > w.nbytes
    return replica.difference()


@pytest.mark.parametrize("size", [2, 4])
def test_gradients_are_those_of_all_rows(ranks: Any, size: int) -> None:
    """Handed out before it is summed, or from another's place, a gradient is of some rows."""
    assert max(ranks(size)(plainly, size)) < CLOSE


def several_dtypes() -> list[str]:
    axis, kinds = axis_of(2), [torch.float64, torch.float32, torch.bfloat16, torch.complex64]
    parameters = [torch.nn.Parameter(torch.ones(3 + i % 7, dtype=kinds[i % 4])) for i in range(40)]
    buckets = Buckets(parameters, axis, 64, 128)
    loss = torch.zeros((), dtype=torch.float64)
    for i, parameter in enumerate(parameters):
        loss = loss + (summed(parameter, axis, buckets) * (i + axis.rank)).sum().real
    with Collectives() as counts:
        loss.backward()
    wrong = [
        f"{i} {p.grad}"
        for i, p in enumerate(parameters)
        if p.grad is None or p.grad.dtype != p.dtype or not (p.grad == 2 * i + 1).all()
    ]
    many = {4 < counts["all_reduce"] < 40}
    return wrong if many == {True} else [str(counts)]


def test_dtypes_have_buckets_of_their_own(ranks: Any) -> None:
    """Side by side in one buffer, some would be cast, or read as what they are not."""
    assert ranks(2)(several_dtypes) == [[], []]


def twice_and_again() -> list[float]:
    replica = Replica(2)
    found = []
    for to_none in (True, False):
        for _ in range(2):
            loss_of(mlp(replica.one, replica.x)).backward()
            loss_of(replica.call(mlp)).backward()
        found.append(replica.difference())
        kept = [w.grad for w in replica.mine]
        for side in (replica.one, replica.mine):
            torch.optim.SGD(side, 0.1).zero_grad(set_to_none=to_none)
        loss_of(mlp(replica.one, replica.x)).backward()
        loss_of(replica.call(mlp)).backward()
        found.append(replica.difference())
        if not to_none:
            assert all(a is w.grad for a, w in zip(kept, replica.mine, strict=True))
    # One graph, gone through twice.
    one, mine = loss_of(mlp(replica.one, replica.x)), loss_of(replica.call(mlp))
    for loss in (one, mine):
        loss.backward(retain_graph=True)
        loss.backward()
    return [*found, replica.difference()]


def test_gradients_accumulate(ranks: Any) -> None:
    """A sum that takes an earlier `.grad` with it adds that of every rank; one into a buffer
    that is used again changes the earlier gradient."""
    assert max(max(found) for found in ranks(2)(twice_and_again)) < CLOSE


def tied() -> list[float]:
    def model(w: Weights, x: torch.Tensor, read: Any = lambda w: w) -> torch.Tensor:
        x = (x @ read(w[0])).tanh()
        x = (x @ read(w[2]) + read(w[1])).tanh()
        return (x @ read(w[0]).T + read(w[1])).tanh() @ read(w[0])

    within = Replica(2)
    loss_of(model(within.one, within.x)).backward()
    loss_of(within.lazy(model)).backward()
    # Two calls of the model in one loss: a GAN's discriminator, a siamese pair.
    across = Replica(2)
    (loss_of(mlp(across.one, across.x)) * loss_of(model(across.one, across.x))).backward()
    (loss_of(across.call(mlp)) * loss_of(across.lazy(model))).backward()
    return [within.difference(), across.difference()]


def test_a_weight_used_twice(ranks: Any) -> None:
    """The second gradient to come overwrites the first, or comes after the bucket is sent."""
    assert max(max(found) for found in ranks(2)(tied)) < CLOSE


def unused() -> list[float]:
    found = []

    def some(w: Weights, x: torch.Tensor, read: Any = lambda w: w) -> torch.Tensor:
        read(w[4]) * 2  # read, and nothing made of it
        return (x @ read(w[0]) + read(w[7])).tanh() @ read(w[8])

    def by_rank(w: Weights, x: torch.Tensor) -> torch.Tensor:
        # Rows decide which weights are used, as experts of a mixture are.
        rank = dist.get_rank()
        return (x @ w[0] + w[7]).tanh() @ (w[8] if rank else w[2])

    def both(w: Weights, x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2)
        return torch.cat(
            [(first @ w[0] + w[7]).tanh() @ w[2], (second @ w[0] + w[7]).tanh() @ w[8]]
        )

    replica = Replica(2)
    loss_of(some(replica.one, replica.x)).backward()
    loss_of(replica.lazy(some)).backward()
    found.append(replica.difference())
    assert [w.grad is None for w in replica.mine].count(False) == 3

    replica = Replica(2)
    loss_of(both(replica.one, replica.x)).backward()
    loss_of(replica.call(by_rank)).backward()
    found.append(replica.difference())
    return found


def test_weights_without_a_gradient(ranks: Any) -> None:
    """Waited for, they block; as zeros, they decay; used on one rank alone, ranks drift apart."""
    assert max(max(found) for found in ranks(2)(unused)) < CLOSE


def other_orders() -> float:
    replica = Replica(2)

    def model(w: Weights, x: torch.Tensor, read: Any = lambda w: w) -> torch.Tensor:
        for one in w:
            x = x + (x.sum(1, keepdim=True) * read(one).sum()).sin()
        return x

    def turned(w: Weights, x: torch.Tensor, read: Any) -> torch.Tensor:
        return model(w[::-1] if replica.axis.rank else w, x, read)

    loss_of(replica.lazy(turned)).backward()
    first, second = replica.x.chunk(2)
    out = torch.cat([model(replica.one, first), model(replica.one[::-1], second)])
    loss_of(out).backward()
    return replica.difference()


def test_ranks_meet_the_weights_in_another_order(ranks: Any) -> None:
    """Buckets filled as gradients come would add one weight's gradient to another's, in silence."""
    assert max(ranks(2)(other_orders)) < CLOSE


def asked_for() -> list[float]:
    replica = Replica(2)
    found = []
    one, mine = loss_of(mlp(replica.one, replica.x)), loss_of(replica.call(mlp))
    for some in (slice(None), slice(2, 5)):
        a = torch.autograd.grad(one, replica.one[some], retain_graph=True)
        b = torch.autograd.grad(mine, replica.mine[some], retain_graph=True)
        found.append(apart(a, b))
        assert all(w.grad is None for w in replica.mine)
    one.backward(inputs=replica.one[2:5], retain_graph=True)
    mine.backward(inputs=replica.mine[2:5], retain_graph=True)
    return [*found, replica.difference()]


def test_autograd_grad_and_inputs(ranks: Any) -> None:
    """A sum that goes to `.grad` by itself is not what `torch.autograd.grad` returns, and is
    left where nobody asked for it."""
    assert max(max(found) for found in ranks(2)(asked_for)) < CLOSE


def second_order() -> list[float]:
    replica = Replica(2)
    found = []
    results = []
    for weights, loss in (
        (replica.one, loss_of(mlp(replica.one, replica.x))),
        (replica.mine, loss_of(replica.call(mlp))),
    ):
        grads = torch.autograd.grad(loss, weights, create_graph=True)
        penalty = sum((g**2).sum() for g in grads)
        (loss + penalty).backward()
        results.append(grads)
    found.append(apart(*results))
    found.append(replica.difference())
    return found


def test_gradients_of_gradients(ranks: Any) -> None:
    """A sum in a buffer has no gradient of its own: a penalty on gradients would change nothing."""
    assert max(max(found) for found in ranks(2)(second_order)) < CLOSE


def hooks(early: bool) -> list[float]:
    replica = Replica(2)
    one: dict[str, torch.Tensor] = {}
    mine: dict[str, torch.Tensor] = {}

    def register() -> None:
        for seen, side in ((one, replica.one), (mine, replica.mine)):
            side[1].register_hook(lambda g, seen=seen: seen.update(before=g.clone()))
            side[2].register_hook(lambda g: g.clamp(-0.01, 0.01))
            side[3].register_post_accumulate_grad_hook(
                lambda p, seen=seen: seen.update(after=p.grad.clone())
            )

    def called(_: Any) -> None:
        raise AssertionError("a hook of a weight without a gradient is called")

    if early:
        register()
        for w in (replica.one[-1], replica.mine[-1]):
            w.register_hook(called)
            w.register_post_accumulate_grad_hook(called)

    def model(w: Weights, x: torch.Tensor) -> torch.Tensor:
        return mlp([*w[:-1], random(0)], x)

    losses = loss_of(model(replica.one, replica.x)), loss_of(replica.call(model))
    if not early:
        register()
    for loss in losses:
        loss.backward()
    return [replica.difference(), *(apart([one[k]], [mine[k]]) for k in ("before", "after"))]


@pytest.mark.parametrize("early", [True, False])
def test_hooks_see_sums(ranks: Any, early: bool) -> None:
    """One that clips what is not summed yet clips each replica's part. In torch, one of a weight
    that is behind a node of many is called without a gradient, too; of one process' it is not."""
    assert max(max(found) for found in ranks(2)(hooks, early)) < CLOSE


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        raise ArithmeticError


def interrupted() -> list[float]:
    replica = Replica(2)
    failing = True

    def model(w: Weights, x: torch.Tensor, read: Any = lambda w: w) -> torch.Tensor:
        for index in range(6):
            x = (x @ read(w[2 * index]) + read(w[2 * index + 1])).tanh()
            if index == 2 and failing:
                x = Fails.apply(x)
        return x + read(w[12]).sum()

    found = []
    loss = loss_of(replica.lazy(model))
    with Collectives() as counts, pytest.raises(ArithmeticError):
        loss.backward(retain_graph=True)
    assert counts["all_reduce"] > 0, "no bucket was on its way"
    assert all(w.grad is None for w in replica.mine)
    with mock.patch.object(Fails, "backward", staticmethod(lambda ctx, grad: grad)):
        loss.backward()  # the same graph
    loss_of(mlp(replica.one, replica.x)).backward()
    found.append(replica.difference())
    with pytest.raises(ArithmeticError):
        loss_of(replica.lazy(model)).backward()
    failing = False
    loss_of(mlp(replica.one, replica.x)).backward()
    loss_of(replica.lazy(model)).backward()
    return [*found, replica.difference()]


def test_a_backward_that_raised_leaves_nothing_behind(ranks: Any) -> None:
    """Half-filled buckets of the failed step would be filled up by the next one's gradients."""
    assert max(max(found) for found in ranks(2)(interrupted)) < CLOSE


def checkpointed(reentrant: bool) -> float:
    replica = Replica(2)

    def model(w: Weights, x: torch.Tensor, read: Any = lambda w: w) -> torch.Tensor:
        def block(x: torch.Tensor, index: int) -> torch.Tensor:
            x = (x @ read(w[index]) + read(w[index + 1])).tanh()
            return x @ read(w[0])

        x = x * read(w[1])
        for index in (2, 4, 6):
            x = checkpoint(block, x, index, use_reentrant=reentrant)  # type: ignore[assignment]
        return x @ read(w[8])

    loss_of(model(replica.one, replica.x)).backward()
    loss_of(replica.lazy(model)).backward()
    return replica.difference()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks(ranks: Any, reentrant: bool) -> None:
    """A backward within a backward ends the outer one's buckets, or is never sent."""
    assert max(ranks(2)(checkpointed, reentrant)) < CLOSE


def none_given() -> float:
    def model(w: Weights, x: torch.Tensor) -> torch.Tensor:
        return mlp([w[0], Nothing.apply(w[1]), *w[2:]], x)

    replica = Replica(2)
    loss_of(model(replica.one, replica.x)).backward()
    loss_of(replica.call(model)).backward()
    assert replica.mine[1].grad is None
    return replica.difference()


class Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> None:
        return None


def test_a_function_that_gives_no_gradient(ranks: Any) -> None:
    """Taken for zeros it would be one, which an optimizer decays by."""
    assert max(ranks(2)(none_given)) < CLOSE


def read_how() -> list[bool]:
    axis = axis_of(2)
    w, frozen, stranger = (torch.nn.Parameter(random(3)) for _ in range(3))
    frozen.requires_grad_(False)
    buckets = Buckets([w, frozen], axis)
    with torch.no_grad():
        unread = summed(w, axis, buckets)
    with Collectives() as counts:
        (summed(stranger, axis, buckets) * (axis.rank + 1) + summed(w, axis)).sum().backward()
    return [
        unread is w,
        summed(frozen, axis, buckets) is frozen,
        summed(w, axis, buckets) is summed(w, axis, buckets),
        counts == {"all_reduce": 2},
        stranger.grad is not None and bool((stranger.grad == 3).all()),
        w.grad is not None and bool((w.grad == 2).all()),
    ]


def test_the_plain_way(ranks: Any) -> None:
    """A weight that is in no bucket is not summed by anyone else."""
    assert ranks(2)(read_how) == [[True] * 6] * 2


def counted(layers: int, limits: Sequence[int]) -> dict[str, int]:
    replica = Replica(2, lambda: make_weights(layers))
    loss = loss_of(replica.call(mlp, limits))
    with Collectives() as counts:
        loss.backward()
    return dict(counts)


def test_one_collective_per_bucket(ranks: Any) -> None:
    """One per weight is right and slow.

    A layer has 576 bytes: with at least 256 in the first bucket and 1024 in the others,
    20 layers fill 1 + 10 or 11. The other collective joins the rows' gradients.
    """
    for counts in ranks(2)(counted, 20, SMALL):
        assert counts["all_reduce"] in (11, 12), counts
    for counts in ranks(2)(counted, 20, (1 << 20, 25 << 20)):
        assert counts["all_reduce"] == 1, counts


class Notes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, events: list[str], name: str) -> torch.Tensor:
        ctx.events, ctx.name = events, name
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        ctx.events.append(ctx.name)
        return grad, None, None


def overlapping() -> list[str]:
    replica = Replica(2)
    events: list[str] = []
    real = dist.all_reduce

    def noted(*args: Any, **kwargs: Any) -> Any:
        events.append("send")
        work = real(*args, **kwargs)
        wait = work.wait
        return mock.Mock(wait=lambda: (events.append("wait"), wait()))

    def model(w: Weights, x: torch.Tensor, read: Any = lambda w: w) -> torch.Tensor:
        for index in range(6):
            x = Notes.apply(x, events, f"layer {index}")
            x = (x @ read(w[2 * index]) + read(w[2 * index + 1])).tanh()
        return x + read(w[12]).sum()

    loss = loss_of(replica.lazy(model))
    with mock.patch.object(dist, "all_reduce", noted):
        loss.backward()
    loss_of(model(replica.one, replica.x)).backward()
    assert replica.difference() < CLOSE
    return events


def test_buckets_are_sent_while_backward_goes_on(ranks: Any) -> None:
    """A node made before the layers runs after them: all would be sent at the end.

    The last layer's weights are the first bucket, two layers each the next. (The gradient
    of a layer's input comes after that of its weights, the first layer's is not wanted.)
    """
    for events in ranks(2)(overlapping):
        events = events[: events.index("wait") + 1]
        assert events == [
            *("send", "layer 5", "layer 4", "send", "layer 3", "layer 2", "send", "layer 1"),
            *("send", "wait"),
        ]


def freed() -> bool:
    replica = Replica(2)
    calls = []
    real = Buckets._open

    def opened(buckets: Buckets) -> Any:
        call = real(buckets)
        calls.append(weakref.ref(call))
        return call

    gc.disable()
    try:
        with mock.patch.object(Buckets, "_open", opened):
            loss_of(replica.call(mlp)).backward()
            loss_of(replica.call(mlp))  # and no backward
        return soon(lambda: all(call() is None for call in calls)) and len(calls) == 2
    finally:
        gc.enable()


def test_a_call_is_freed_with_its_graph(ranks: Any) -> None:
    """A cycle through autograd's nodes is never found: each step would leave its gradients."""
    assert ranks(2)(freed) == [True, True]
