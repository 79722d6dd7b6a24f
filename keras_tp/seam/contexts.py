"""What is going on just now: who computes, for whom, and whether with values."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Set
from typing import Any, Protocol

import torch
from keras.src import backend
from keras.src.backend.common import global_state
from keras.src.backend.common.stateless_scope import in_stateless_scope
from keras.src.backend.common.symbolic_scope import in_symbolic_scope


def is_symbolic() -> bool:
    """Whether Keras only asks for shapes: no values, no communication."""
    return in_symbolic_scope() or str(backend.core.get_device()) == "meta"


def is_stateless() -> bool:
    """Whether Keras may have been handed values to compute with in place of the variables'."""
    return bool(in_stateless_scope())


class Replicas(Protocol):
    """What Keras's side asks of `keras_tp.replicas.Replicas`, while each replica computes its rows.

    Attributes:
        axis: name of the mesh axis along which they stand.
        rows: of this replica.
        total: of all replicas.
        fixed: shapes in which random numbers are drawn whatever the number of rows.
        training: whether the model is called for training.
        alike: losses that every replica has computed of all rows.
    """

    axis: str
    rows: int
    total: int
    fixed: Set[tuple[int, ...]]
    training: bool
    alike: list[torch.Tensor]

    def own(self, variable: Any) -> torch.Tensor:
        """What this rank stores of a variable, for use on its rows."""

    def renew(self, variable: Any) -> None:
        """Something was assigned to the variable."""

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of `x` over the replicas, for use on the rows of each."""

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """The mean of means over rows, for use by what all replicas do alike."""

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of all replicas."""

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """This replica's rows of all."""


_REPLICAS = "keras_tp_replicas"


def current_replicas() -> Replicas | None:
    """The replicas, while each computes its own rows; None where all compute the same."""
    return global_state.get_global_attribute(_REPLICAS)


@contextlib.contextmanager
def on_rows_of(replicas: Replicas | None) -> Iterator[None]:
    """While open, weights are read and numbers drawn for this replica's rows; None for all rows."""
    before = current_replicas()
    global_state.set_global_attribute(_REPLICAS, replicas)
    try:
        yield
    finally:
        global_state.set_global_attribute(_REPLICAS, before)


class Parts(Protocol):
    """What Keras's side asks of `keras_tp.region_calls`, while layers hand each other shards.

    Attributes:
        parts: number of ranks that have one each.
        rank: which this rank has.
    """

    parts: int
    rank: int

    def next_dim(self) -> int | None:
        """Along which dim the tensor is cut that now is dropped from; None if it is whole."""

    def skip(self, count: int) -> None:
        """Somebody else has been asked for the next `count` dims."""


_PARTS = "keras_tp_parts"


def current_parts() -> Parts | None:
    """How what is dropped from is cut, where layers hand each other shards."""
    return global_state.get_global_attribute(_PARTS)


@contextlib.contextmanager
def drawing_parts(parts: Parts | None) -> Iterator[None]:
    """While open, dropout draws for whole tensors, of which it is given parts; None for whole."""
    before = current_parts()
    global_state.set_global_attribute(_PARTS, parts)
    try:
        yield
    finally:
        global_state.set_global_attribute(_PARTS, before)


class Leader(Protocol):
    """What Keras's side asks of `keras_tp.leading.Leader`, while the first rank works alone.

    Attributes:
        model: what the other ranks hold their shards of.
    """

    model: Any

    def announce_read(self, variable: Any) -> None:
        """The shards of a variable are about to be gathered."""

    def load(self, path: Any, options: dict[str, Any], load: Callable[[], None]) -> None:
        """The weights in a file are to be loaded into the model, here by `load`."""


_LEADER = "keras_tp_leader"


def current_leader() -> Leader | None:
    """On the first rank, while it works alone and the others follow; else None."""
    return global_state.get_global_attribute(_LEADER)


@contextlib.contextmanager
def led_by(leader: Leader | None) -> Iterator[None]:
    """While open, `leader` is told what the other ranks must take part in; None for nobody."""
    before = current_leader()
    global_state.set_global_attribute(_LEADER, leader)
    try:
        yield
    finally:
        global_state.set_global_attribute(_LEADER, before)


def announce_read(variable: Any) -> None:
    """Tells the leader, if there is one, that the shards of a variable are about to be gathered."""
    leader = current_leader()
    if leader is not None:
        leader.announce_read(variable)


class Reads(Protocol):
    """What Keras's side asks of `keras_tp.prefetch.Reads`, while a call of a model looks ahead."""

    def joining(self, variable: Any) -> Callable[..., torch.Tensor]:
        """What gathers the variable's shards, in place of `keras_tp.collectives.join`."""


_READS = "keras_tp_reads"


def current_reads() -> Reads | None:
    """What follows the gathers of a model's call, while one looks ahead."""
    return global_state.get_global_attribute(_READS)


@contextlib.contextmanager
def followed_by(reads: Reads | None) -> Iterator[None]:
    """While open, `reads` gathers the weights that layers read; None for each when it is read."""
    before = current_reads()
    global_state.set_global_attribute(_READS, reads)
    try:
        yield
    finally:
        global_state.set_global_attribute(_READS, before)


def joining_of(variable: Any) -> Callable[..., torch.Tensor] | None:
    """What gathers a variable that is read now, if it is not to be gathered in the plain way."""
    if torch.compiler.is_compiling():
        return None
    reads = current_reads()
    # Of what the first rank reads alone the others follow each gather, and know of none ahead.
    return None if reads is None or current_leader() is not None else reads.joining(variable)


def in_call() -> bool:
    """Whether a layer's `call` runs."""
    return global_state.get_global_attribute("current_call_ctx") is not None


def is_training() -> bool:
    """Whether the layer whose `call` runs is called to train, though its `call` be not told."""
    context = global_state.get_global_attribute("current_call_ctx")
    return bool(getattr(context, "training", None))


_READING_SHARDS = "keras_tp_reading_shards"


def reads_shards() -> bool:
    """Whether a sharded variable is read as this rank's shard."""
    return bool(global_state.get_global_attribute(_READING_SHARDS))


@contextlib.contextmanager
def reading_shards(on: bool = True) -> Iterator[None]:
    """While open, a sharded variable is read as this rank's shard, and may be assigned one."""
    before = global_state.get_global_attribute(_READING_SHARDS)
    global_state.set_global_attribute(_READING_SHARDS, on)
    try:
        yield
    finally:
        global_state.set_global_attribute(_READING_SHARDS, before)


_STEPPING = "keras_tp_stepping"


def in_step() -> bool:
    """Whether one of Keras's own steps of training or evaluation goes on, which is not compiled."""
    going_on = bool(global_state.get_global_attribute(_STEPPING))
    return going_on and not torch.compiler.is_compiling()


@contextlib.contextmanager
def stepping(on: bool = True) -> Iterator[None]:
    """While open, what a model gives goes to a loss and metrics, and nowhere else."""
    before = global_state.get_global_attribute(_STEPPING)
    global_state.set_global_attribute(_STEPPING, on)
    try:
        yield
    finally:
        global_state.set_global_attribute(_STEPPING, before)
