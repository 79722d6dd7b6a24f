"""Weights gathered ahead of their use, on real ranks, against one process, in float64."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import keras
import models
import numpy as np
import parity
import pytest
import torch
import torch.distributed as dist
from counting import Collectives, Traffic
from keras import layers, ops
from parity import layout_map
from precision import real_float64

import keras_tp
from keras_tp import prefetch
from keras_tp.joins import Join
from keras_tp.leading import lead
from keras_tp.prefetch import gathering_at_once
from keras_tp.seam.contexts import current_reads
from keras_tp.seam.variables import local_tensor
from keras_tp.trails import MOST, MOST_STEPS, SMALL, Step, Trail
from keras_tp.whereabouts import whereabouts

CLOSE = 1e-10
KERNELS = {".*kernel": ("batch", None)}
OVER_REPLICAS = KERNELS | {".*bias": ("batch",)}
WIDTH = 96  # of which a float64 kernel is not small
assert 8 * WIDTH**2 > SMALL


@contextmanager
def events() -> Iterator[list[str]]:
    """What is begun, taken and gathered as it is read, in this order, by names of layers."""
    found: list[str] = []

    def name(source: Any) -> str:
        layer, _, weight = source.variable.path.rpartition("/")
        return layer.rpartition("/")[2] + ("" if weight == "kernel" else f" {weight}")

    begin, read, plain = prefetch._Source.begin, prefetch._Walk.read, prefetch.join

    def begins(source: Any) -> Any:
        found.append(f"begin {name(source)}")
        return begin(source)

    def reads(walk: Any, source: Any, x: Any, early: bool) -> Any:
        found.append(f"read {name(source)}")
        return read(walk, source, x, early)

    def joins(*args: Any) -> Any:
        found.append("gather")
        return plain(*args)

    with (
        mock.patch.object(prefetch._Source, "begin", begins),
        mock.patch.object(prefetch._Walk, "read", reads),
        mock.patch.object(prefetch, "join", joins),
    ):
        yield found


def numbers(rows: int = 5, width: int = WIDTH) -> torch.Tensor:
    return torch.tensor(np.random.default_rng(rows).standard_normal((rows, width)))


def alone_and_together(
    build: Callable[[], Any],
    layout: Mapping[str, Any] = KERNELS,
    **axes: int,
) -> tuple[Any, Any]:
    """One model as one process has it, and as the ranks have it."""
    one, many = parity.build_seeded(build), parity.build_seeded(build)
    axes = axes or {"batch": 2}
    keras_tp.parallelize(many, layout_map(layout, axes), check_batches=False)
    return one, many


def after_the_first(model: Any, x: torch.Tensor, **options: Any) -> None:
    """Rows are compared in the 1st, 2nd, 4th, ... call, by calls of their own; the 32nd is next."""
    for _ in range(16):
        model(x, **options)


def stack(depth: int = 4, activation: Any = "tanh") -> Any:
    names = [f"d{i}" for i in range(depth)]
    dense = [layers.Dense(WIDTH, activation, use_bias=False, name=name) for name in names]
    return keras.Sequential([keras.Input((WIDTH,)), *dense])


# Numbers.


def uneven() -> Any:
    """Of a large kernel the second rank has nothing; others do not divide, some are small."""
    return keras.Sequential(
        [
            keras.Input((1,)),
            layers.Dense(1),
            layers.Dense(3 * WIDTH * WIDTH, "tanh"),
            layers.Reshape((3, WIDTH * WIDTH)),
            layers.Dense(7, "tanh"),
            layers.Conv1D(5, 2, activation="tanh"),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )


def odd() -> Any:
    return numbers(5, 1).numpy(), numbers(5, 3).numpy()


def several(width: int = 10) -> Any:
    """Dense layers whose kernels are of several sizes, with biases."""
    sizes = (WIDTH, WIDTH, 8, WIDTH, width)
    return keras.Sequential([keras.Input((6,)), *(layers.Dense(n, "tanh") for n in sizes)])


def some() -> Any:
    return numbers(7, 6).numpy(), numbers(7, 10).numpy()


BOTH = {".*dense/kernel": ("batch", "model"), ".*dense_[13]/kernel": ("model", "batch")}
ALONG_MODEL = {".*attention_./.*/kernel": (None, None, "model"), ".*(beta|gamma)": ("model",)}
UNEVEN = {".*dense.*kernel": ("batch", None), ".*conv1d/kernel": (None, None, "batch")}
# What is built, the layout, data, the mesh, the loss.
TRAINED: dict[str, tuple[Any, ...]] = {
    "over replicas": (several, OVER_REPLICAS, some, {"batch": 2, "model": 1}, "mse"),
    "over four": (several, OVER_REPLICAS, some, {"batch": 4, "model": 1}, "mse"),
    "over both": (several, BOTH, some, {"batch": 2, "model": 2}, "mse"),
    "by each layer": (
        models.transformer,
        ALONG_MODEL,
        models.transformer_data,
        {"batch": 1, "model": 2},
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    ),
    "uneven": (uneven, UNEVEN, odd, {"batch": 2, "model": 1}, "mse"),
}


def trained(name: str) -> tuple[float, list[str]]:
    build, layout, data, mesh, loss = TRAINED[name]
    with events() as found:
        report = parity.compare(build, layout, mesh, data(), loss=loss, steps=6)
    return report.worst(), found


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.filterwarnings("ignore::keras_tp.LayoutWarning")
def test_training_is_that_of_one_process(ranks: Any, name: str) -> None:
    """A weight that was on its way is another's, or of the step before; one rank begins what
    another does not, such as one that has nothing of a weight and takes it for a small one."""
    mesh = TRAINED[name][3]
    results = ranks(mesh["batch"] * mesh["model"])(trained, name)
    assert max(worst for worst, _ in results) < CLOSE
    orders = [found for _, found in results]
    assert all(order == orders[0] for order in orders)
    begun = [event for event in orders[0] if event.startswith("begin")]
    assert len(begun) > 20, "nothing was begun ahead"


# What is sent, and when.


def sent() -> list[Any]:
    keras.utils.set_random_seed(0)
    model = models.dense_stack()
    model.compile("adam", "mse")
    keras_tp.parallelize(model, layout_map(OVER_REPLICAS, {"batch": 2}), check_batches=False)
    x, y = (values.astype("float32") for values in models.dense_data())
    found: list[Any] = []
    for step in (lambda: model.train_on_batch(x, y), lambda: model.predict_on_batch(x)):
        for _ in range(4):  # in which rows are compared, but for the third
            step()
        with gathering_at_once(), Traffic() as plain:
            step()
        with events() as order, Traffic() as ahead:
            step()
        found += [plain, ahead, sum(event.startswith("begin") for event in order)]
    return found


def test_as_much_is_sent(ranks: Any) -> None:
    """A weight that is begun and gathered besides is sent twice, and the price is wrong."""
    for trained, trained_ahead, begun, predicted, predicted_ahead, begun_too in ranks(2)(sent):
        assert trained == trained_ahead
        assert predicted == predicted_ahead
        assert begun == begun_too == 7  # of 8


def ordered(bias: bool) -> list[str]:
    with real_float64():
        computed: list[str] = []

        def told(name: str) -> Callable[[Any], Any]:
            def activation(x: Any) -> Any:
                computed.append(name)
                return ops.tanh(x)

            return activation

        dense = [
            layers.Dense(WIDTH, told(f"compute d{i}"), use_bias=bias, name=f"d{i}")
            for i in range(4)
        ]
        model = keras.Sequential([keras.Input((WIDTH,)), *dense])
        layout = layout_map(OVER_REPLICAS if bias else KERNELS, {"batch": 2})
        keras_tp.parallelize(model, layout, check_batches=False)
        x = numbers()
        after_the_first(model, x)
        with events() as found:
            computed_before = computed
            computed = found
            model(x)
            computed = computed_before
        return found


def test_the_next_weight_is_on_its_way_while_a_layer_computes(ranks: Any) -> None:
    """Begun only when it is read, a weight is waited for in full; two large ones ahead take
    the memory of two; of layers with biases the next kernel would begin only after the product."""
    for found in ranks(2)(ordered, False):
        assert found == [
            *("read d0", "gather", "begin d1", "compute d0"),
            *("read d1", "begin d2", "compute d1"),
            *("read d2", "begin d3", "compute d2"),
            *("read d3", "compute d3"),
        ]
    for found in ranks(2)(ordered, True):
        assert found == [
            *("read d0", "gather", "begin d0 bias", "begin d1", "read d0 bias", "compute d0"),
            *("read d1", "begin d1 bias", "begin d2", "read d1 bias", "compute d1"),
            *("read d2", "begin d2 bias", "begin d3", "read d2 bias", "compute d2"),
            *("read d3", "begin d3 bias", "read d3 bias", "compute d3"),
        ]


# Ways that part.


class Branching(keras.Model):
    """Goes one of several ways; the last layer of the long one is left out by the short one."""

    def __init__(self) -> None:
        super().__init__()
        self.way = "left"
        for name in ("first", "left", "right", "last"):
            setattr(self, name, layers.Dense(WIDTH, "tanh", use_bias=False, name=name))

    def build(self, shape: Any) -> None:
        for layer in self.layers:
            layer.build(shape)
        self.built = True

    def call(self, x: Any, training: bool = False) -> Any:
        x = self.first(x)
        x = self.right(x) if self.way == "right" else self.left(x)
        if self.way == "fails":
            raise ArithmeticError
        if self.way != "short" and not training:
            x = self.last(x)
        return x


def branching() -> Any:
    model = Branching()
    model(numbers(2))
    return model


def parted() -> tuple[float, list[list[str]]]:
    with real_float64():
        one, many = alone_and_together(branching)
        x, worst, orders = numbers(), 0.0, []
        after_the_first(many, x)
        for way in ("left", "right", "right", "left", "right", "short", "left", "short"):
            one.way = many.way = way
            with events() as found:
                outputs = many(x)
            worst = max(worst, parity.difference(one(x).detach(), outputs.detach()))
            orders.append(found)
        return worst, orders


def test_ways_that_part_are_told_apart(ranks: Any) -> None:
    """What was begun for one way is taken on the other, whose weights have the same shape; or is
    begun in vain for ever; or a way that ends early leaves what it began to the next call."""
    for worst, orders in ranks(2)(parted):
        assert worst < CLOSE
        left = ["read first", "gather", "begin left", "read left", "begin last", "read last"]
        assert orders[0] == left
        # A new way: what is begun in vain is gathered by its own way once more, and never again.
        assert orders[1] == [
            *("read first", "gather", "begin left", "read right", "gather"),
            *("read last", "gather"),
        ]
        right = ["read first", "gather", "read right", "gather", "begin last", "read last"]
        assert orders[2] == orders[4] == right
        assert orders[3] == [
            *("read first", "gather", "read left", "gather", "begin last", "read last")
        ]
        assert orders[5] == ["read first", "gather", "read left", "gather", "begin last"]
        ends = ["read first", "gather", "read left", "gather"]
        assert orders[6] == [*ends, "read last", "gather"]
        assert orders[7] == ends


def modes() -> list[list[str]]:
    with real_float64():
        _, many = alone_and_together(branching)
        x, found = numbers(), []
        for training in (True, False):
            after_the_first(many, x, training=training)
        for training in (True, False):
            with events() as order, torch.no_grad():
                many(x, training=training)
            found.append(order)
        return found


def test_training_and_inference_go_their_own_ways(ranks: Any) -> None:
    """In one trail, what only one of them gathers is never begun ahead: there the ways part."""
    trained = ["read first", "gather", "begin left", "read left"]
    assert ranks(2)(modes) == [[trained, [*trained, "begin last", "read last"]]] * 2


class Either(layers.Layer):
    """Two weights of the same values, of which each replica takes another."""

    turned = False

    def build(self, shape: Any) -> None:
        self.mine, self.theirs = (
            self.add_weight(shape=(8, 8), initializer="ones", name=f"{name}_kernel")
            for name in ("mine", "theirs")
        )

    def call(self, x: Any) -> Any:
        second = dist.is_initialized() and dist.get_rank() > 1
        return ops.matmul(x, self.theirs if second and self.turned else self.mine)


def either() -> Any:
    keras.utils.set_random_seed(3)
    dense = [layers.Dense(n, use_bias=False, name=f"d{i}") for i, n in enumerate((8, 6, WIDTH))]
    # (Small ones: when the first is read, all the others are begun.)
    return keras.Sequential([keras.Input((WIDTH,)), dense[0], Either(name="e"), *dense[1:]])


def by_replica() -> tuple[float, dict[str, int]]:
    with real_float64():
        one, many = either(), either()
        layout = {".*d./kernel": ("batch", None), ".*e/.*kernel": ("model", None)}
        keras_tp.parallelize(
            many, layout_map(layout, {"batch": 2, "model": 2}), check_batches=False
        )
        x = numbers(4)
        after_the_first(many, x)
        many.layers[1].turned = True
        worst = 0.0
        for _ in range(3):
            with Collectives() as counts:
                outputs = many(x)
            worst = max(worst, parity.difference(one(x).detach(), outputs.detach()))
        return worst, dict(counts)


@pytest.mark.filterwarnings("ignore::keras_tp.LayoutWarning")
def test_replicas_may_differ_in_what_they_gather_along_another_axis(ranks: Any) -> None:
    """In one trail for all axes a replica that goes another way along "model" forgets what both
    have begun along "batch", gathers it again, and gets what the other sends next."""
    results = ranks(4)(by_replica)
    assert max(worst for worst, _ in results) < CLOSE
    assert all(counts == results[0][1] for _, counts in results)


# What comes between.


def failing() -> tuple[float, list[str], list[str]]:
    with real_float64():
        one, many = alone_and_together(branching)
        x = numbers()
        after_the_first(many, x)
        many.way = "fails"
        with events() as failed, pytest.raises(ArithmeticError):
            many(x)
        assert current_reads() is None
        many.way = "left"
        for model in (one, many):
            model.last.kernel.assign(ops.convert_to_numpy(model.last.kernel) / 2)
        with events() as found:
            outputs = many(x)
        return parity.difference(one(x).detach(), outputs.detach()), failed, found


def test_a_call_that_raises_leaves_nothing_behind(ranks: Any) -> None:
    """What it began would be taken by the next call; or its way would be taken for one that ends
    there, and nothing after it would be begun again."""
    for worst, failed, found in ranks(2)(failing):
        assert worst < CLOSE
        assert failed == ["read first", "gather", "begin left", "read left", "begin last"]
        assert found == [*failed, "read last"]


class Writing(layers.Layer):
    """Writes the weight of a layer that comes after it."""

    def __init__(self, other: Callable[[], Any]):
        super().__init__()
        self.other, self.how, self.value = other, "", 0.0

    def call(self, x: Any) -> Any:
        if self.how == "assign":
            self.other().assign(np.full((WIDTH, WIDTH), self.value))
        elif self.how:  # other memory, as for weights that are tried
            local = local_tensor(self.other())
            local.data = torch.full_like(local.data, self.value)
        return x


def writing() -> Any:
    dense = [layers.Dense(WIDTH, use_bias=False, name=name) for name in ("d0", "d1", "d2")]
    writes = Writing(lambda: dense[1].kernel)
    return keras.Sequential([keras.Input((WIDTH,)), dense[0], writes, *dense[1:]])


def written(how: str) -> tuple[float, list[list[str]]]:
    with real_float64():
        one, many = alone_and_together(writing)
        x, worst, orders = numbers(), 0.0, []
        after_the_first(many, x)
        for calls in range(3):
            for model in (one, many):
                model.layers[1].how, model.layers[1].value = how, 1 / (2 + calls)
            with events() as found, torch.no_grad():
                outputs = many(x)
            with torch.no_grad():
                worst = max(worst, parity.difference(one(x), outputs))
            orders.append(found)
        return worst, orders


@pytest.mark.parametrize("how", ["assign", "data"])
def test_what_is_written_meanwhile_is_gathered_again(ranks: Any, how: str) -> None:
    """The value of before is taken; or each call begins in vain what it will write."""
    for worst, orders in ranks(2)(written, how):
        assert worst < CLOSE
        begun = ["read d0", "gather", "begin d1", "read d1", "gather", "begin d2", "read d2"]
        assert orders == [begun, *[[event for event in begun if event != "begin d1"]] * 2]


def evaluating() -> tuple[list[float], list[str]]:
    with real_float64():
        one, many = alone_and_together(branching)
        x, other = numbers(), numbers(6)
        after_the_first(many, x, training=True)
        after_the_first(many, x)
        seen: list[list[Any]] = []
        orders: list[str] = []
        for model in (one, many):
            model.optimizer = keras.optimizers.SGD(0.05)
            model.optimizer.build([v for v in model.trainable_variables if "right" not in v.path])
            values = []
            for _ in range(3):
                model.zero_grad()
                with events() as found:
                    loss = (model(x, training=True) ** 2).sum()
                    with torch.no_grad():  # an evaluation between forward and backward
                        values.append(float((model(other) ** 2).sum()))
                    loss = loss * (model(other, training=True) ** 3).sum()
                    for _ in range(2):  # what it gives is given to it again
                        loss = loss + model(model(x)).sum()
                loss.backward()
                orders = found
                used = [v for v in model.trainable_variables if "right" not in v.path]
                with torch.no_grad():
                    model.optimizer.apply([v.value.grad for v in used], used)
                values.append(float(loss.detach()))
            seen.append([*values, *keras_tp.full_weights(model).values()])
        return [parity.difference(a, b) for a, b in zip(*seen, strict=True)], orders


def test_evaluation_inside_of_training(ranks: Any) -> None:
    """A weight is begun before the optimizer's step and taken after it; a call without gradients
    begins what the next one with gradients takes, whose graph then lacks the weight."""
    for found, orders in ranks(2)(evaluating):
        assert max(found) < CLOSE
        assert sum(event.startswith("begin") for event in orders) == 1 + 2 + 1 + 4 * 2


class Telling(layers.Layer):
    """Has the first rank alone read the weight of a layer that comes after it."""

    def __init__(self) -> None:
        super().__init__()
        self.model: Callable[[], Any] = lambda: None
        self.seen: Any = 0.0

    def call(self, x: Any) -> Any:
        model = self.model()
        if model is not None:
            kernel = model.layers[-1].kernel
            self.seen = lead(model, lambda: float(ops.sum(kernel.value).detach()))
        return x


def led() -> tuple[float, list[str], Any]:
    with real_float64():

        def build() -> Any:
            dense = [layers.Dense(WIDTH, use_bias=False, name=f"d{i}") for i in range(4)]
            return keras.Sequential([keras.Input((WIDTH,)), dense[0], Telling(), *dense[1:]])

        one, many = alone_and_together(build)
        x = numbers()
        after_the_first(many, x)
        many.layers[1].model = lambda: many
        with events() as found, torch.no_grad():
            outputs = many(x)
            gap = parity.difference(one(x), outputs)
        return gap, found, many.layers[1].seen


def test_what_the_first_rank_reads_alone_is_no_part_of_the_call(ranks: Any) -> None:
    """It alone leaves the way, forgets what all have begun, and gathers it alone."""
    results = ranks(2)(led)
    for gap, found, _ in results:
        assert gap < CLOSE
        assert found == results[0][1]
        assert found.count("gather") == 1
    assert results[0][2] is not None
    assert results[1][2] is None


def verified() -> tuple[bool, list[str], list[str]]:
    model = stack()
    keras_tp.parallelize(model, layout_map(KERNELS, {"batch": 2}), check_batches=False)
    x = numbers().float()
    after_the_first(model, x)
    with events() as before:
        model(x)
    equal = bool(keras_tp.verify(model, x))
    with events() as after:
        model(x)
    return equal, before, after


def test_a_verification_leaves_no_trail(ranks: Any) -> None:
    """It gathers each layer's weights several times: ways of its own, at which all others part."""
    for _, before, after in ranks(2)(verified):
        assert before == after
        assert sum(event.startswith("begin") for event in after) == 3


def compiled(what: str) -> tuple[float, list[str]]:
    one, many = parity.build_seeded(stack), parity.build_seeded(stack)
    keras_tp.parallelize(many, layout_map(KERNELS, {"batch": 2}), check_batches=False)
    x = numbers().float()
    after_the_first(many, x)
    step: Callable[[Any], Any] = many
    if what == "the model":
        step = torch.compile(lambda x: many(x), backend="eager")
    else:
        many.layers[1].call = torch.compile(many.layers[1].call, backend="eager")
    with events() as found, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's compiler has some of its own
        outputs = step(x)
    return parity.difference(one(x).detach(), outputs), found


@pytest.mark.parametrize("what", ["the model", "a layer"])
def test_compiled_code_gathers_as_it_reads(ranks: Any, what: str) -> None:
    """A compiler cannot trace a wait, nor a trail that grows."""
    for gap, found in ranks(2)(compiled, what):
        assert gap < 1e-5
        assert "read d1" not in found
        assert bool(found) == (what == "a layer")


# Without ranks.


def test_a_rank_that_waits_for_a_weight_says_so() -> None:
    """Nobody would be named: the wait is no collective of torch's, but on its work."""
    begun, inside = threading.Event(), threading.Event()
    join = Join.__new__(Join)
    join.work = SimpleNamespace(wait=lambda: (inside.set(), begun.wait(10)))  # type: ignore[assignment]
    join.parts = []

    def wait() -> None:
        with mock.patch("keras_tp.joins.placed"):
            join.shape = join.dtype = join.dim = join.sizes = join.axis = None  # type: ignore[assignment]
            join.result()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    assert inside.wait(10)
    found = whereabouts(thread.ident or 0)
    begun.set()
    thread.join(10)
    assert found.waits == "all_gather of a weight"


def way(trail: Trail[str], *names: str, size: int = 0, ends: bool = True) -> Step[str]:
    step = trail.start
    for name in names:
        step = trail.go(step, name, name, size, name != "late") or step
    step.ended = ends
    return step


def ahead(trail: Trail[str], *names: str) -> list[str | None]:
    step = trail.start
    for name in names:
        step = step.after[name]
    return [later.what for later in step.ahead()]


def test_what_is_begun_ahead() -> None:
    """As far as calls agree, up to one that is large, and no more than a few."""
    trail: Trail[str] = Trail()
    way(trail, *"abc")
    assert ahead(trail, "a") == ["b", "c"]
    assert ahead(trail, "a", "b", "c") == []
    way(trail, *"abd")
    assert ahead(trail, "a") == ["b"]
    way(trail, "a")
    assert ahead(trail, "a") == []
    assert ahead(trail, "a", "b") == []
    way(large := Trail(), *"abcd", size=SMALL + 1)
    assert ahead(large, "a") == ["b"]
    way(late := Trail(), "a", "b", "late", "c")
    assert ahead(late, "a") == ["b"]
    way(many := Trail(), *map(str, range(3 * MOST)))
    assert ahead(many, "0") == [str(i) for i in range(1, MOST + 1)]


def test_a_trail_does_not_grow_for_ever() -> None:
    """A model that goes another way each time would leave a tree of all of them."""
    trail: Trail[int] = Trail()
    made = [trail.go(trail.start, i, i, 0, True) for i in range(MOST_STEPS + 2)]
    assert made[-2:] == [None, None]
    assert len(trail.start.after) == MOST_STEPS
    assert trail.go(trail.start, 0, 0, 0, True) is made[0]
