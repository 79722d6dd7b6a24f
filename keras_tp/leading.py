"""What the first rank does alone, such as writing a file, while the others give what it reads.

It runs code that is not ours (Keras's saving, a callback), which may read any
sharded variable in any order, and may fail anywhere. So the others do not run the
same code and hope that its collectives match: they follow. The first rank
announces each gather, and its end, good or bad, and so nobody is left waiting.
"""

from __future__ import annotations

import contextlib
import functools
import pickle
from collections.abc import Callable
from typing import Any, NoReturn

import keras
import torch
import torch.distributed as dist

from keras_tp.errors import LayoutError
from keras_tp.messages import anywhere, broadcast_object, control_device
from keras_tp.seam.contexts import current_leader, led_by
from keras_tp.seam.distribution import distribution_of, is_installed
from keras_tp.seam.layers import calling, is_part, variables_of, walk_layers
from keras_tp.seam.saving import load_alone
from keras_tp.seam.variables import local_tensor, sharding_of
from keras_tp.seam.weights import version_of

_DONE, _FAILED, _READ, _LOAD = range(4)
_ALONE = (
    "What writes files (a ModelCheckpoint or TensorBoard, and what is derived from one) runs on "
    "the first rank alone."
)
_ELSEWHERE = (
    "in a callback of your own, derived from keras.callbacks.Callback: that runs on every rank."
)


def held_together(model: Any) -> bool:
    """Whether the ranks of the job hold `model` together: it, a part of it, or it as a part.

    A model that is not parallelized, or not yet and not made under a
    distribution, belongs to each rank for itself, as in plain Keras.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    if not isinstance(model, keras.layers.Layer):
        return False
    if is_part(model):
        return True
    if is_installed() and keras.distribution.distribution() is not None:
        return True
    owners = walk_layers(model)
    return any(is_part(owner.layer) for owner in owners) or any(
        sharding_of(v) is not None or distribution_of(v) is not None for v in variables_of(owners)
    )


def lead(model: Any, work: Callable[[], Any], *, watch: bool = False) -> Any:
    """What `work()` gives on the first rank, which alone does it; None on the others.

    Collective: one small broadcast, and one more with the gathers of each
    variable that `work` reads. Within another `lead`, which the first rank alone
    can be, it is `work()`.

    Args:
        model: held by all ranks together; `work` may read its variables and
            those of its optimizer, in full, and load weights into it.
        work: must not compute with the model, for which the others would be needed.
        watch: whether to look if `work` assigns to variables, which the others
            would not learn of.

    Raises:
        Exception: on every rank, what `work` raises on the first.
        LayoutError: on every rank, if `work` computes with the model, or assigns.
    """
    if current_leader() is not None:
        return work()
    if dist.get_rank() > 0:
        return _follow(model)
    try:
        leader = Leader(model)
        before = leader.versions() if watch else {}
        with led_by(leader), calling(model, _refuse_call):
            result = work()
        if watch and not leader.loaded:
            _check_unassigned(before, leader.versions())
    except BaseException as error:
        _say(_FAILED)
        broadcast_object(_portable(error))
        raise
    _say(_DONE)
    return result


class Leader:
    """The first rank, as it tells the others what to take part in.

    Args:
        model: as for `lead`.
    """

    def __init__(self, model: Any):
        self.model = model
        self.loaded = False
        self.numbers: dict[int, int] = {}

    def versions(self) -> dict[int, tuple[str, int]]:
        """Of each variable its path, and a number that grows with each assignment."""
        return {id(v): (v.path, version_of(local_tensor(v))) for v in _variables(self.model)}

    def announce_read(self, variable: Any) -> None:
        """Has the others take part in a gather of `variable`. One small broadcast."""
        if not self.numbers:
            self.numbers = {id(v): number for number, v in enumerate(sharded_variables(self.model))}
        if id(variable) not in self.numbers:
            raise LayoutError(
                f"it reads '{variable.path}', which is sharded, and no part of '{self.model.name}' "
                "or its optimizer, so that the other ranks do not know of it.",
                where="what the first rank does alone",
            )
        _say(_READ, self.numbers[id(variable)])

    def load(self, path: Any, options: dict[str, Any], load: Callable[[], None]) -> None:
        """Has every rank load the file `path`, this one by `load`.

        Raises:
            Exception: what `load` raises.
            OSError: another rank cannot load what this one can.
        """
        self.loaded = True
        _say(_LOAD)
        broadcast_object((path, options))
        with led_by(None):  # every rank does the same now
            load_everywhere(path, load)


def load_everywhere(path: Any, load: Callable[[], None]) -> None:
    """Has every rank load the file `path` by `load`, which does not communicate. Collective.

    Raises:
        Exception: what `load` raises here.
        OSError: another rank cannot load what this one can.
    """
    failure = None
    try:
        load()
    except Exception as error:
        failure = error
    failures = _gather_failures(failure)
    if failure is not None:
        raise failure
    if failures:
        rank, message = failures[0]
        raise OSError(
            f"rank {rank} cannot load '{path}', which rank {dist.get_rank()} can ({message}). Keep "
            "it where every rank can read it."
        )


def _follow(model: Any) -> None:
    """Takes part in what the first rank announces, until it is done."""
    variables: list[Any] = []
    while True:
        kind, number = _hear()
        if kind == _READ:
            variables = variables or sharded_variables(model)
            shard = local_tensor(variables[number]).detach()
            sharding_of(variables[number]).full(shard)  # type: ignore[union-attr]
        elif kind == _LOAD:
            path, options = broadcast_object(None)
            with contextlib.suppress(Exception):  # which the first rank raises, to all
                load_everywhere(path, functools.partial(load_alone, model, path, **options))
        elif kind == _FAILED:
            raise broadcast_object(None)
        else:
            return


def _variables(model: Any) -> list[Any]:
    """Those of `model` and its optimizer, in the same order on every rank."""
    optimizer = getattr(model, "optimizer", None)
    slots = [] if optimizer is None else optimizer.variables
    return list({id(v): v for v in (*variables_of(walk_layers(model)), *slots)}.values())


def sharded_variables(model: Any) -> list[Any]:
    """Those of `model` and its optimizer that are shards, in the same order on every rank."""
    return [v for v in _variables(model) if sharding_of(v) is not None]


def _check_unassigned(
    before: dict[int, tuple[str, int]], after: dict[int, tuple[str, int]]
) -> None:
    assigned = [found[0] for key, found in after.items() if before.get(key, found) != found]
    if assigned:
        raise LayoutError(
            f"it assigns to '{assigned[0]}', which the other ranks do not learn of. {_ALONE} "
            f"Assign {_ELSEWHERE}",
            where="what the first rank does alone",
        )


def _say(kind: int, number: int = 0) -> None:
    dist.broadcast(torch.tensor([kind, number], device=control_device()), src=0)


def _hear() -> tuple[int, int]:
    heard = torch.tensor([_DONE, 0], device=control_device())
    dist.broadcast(heard, src=0)
    kind, number = heard.tolist()
    return kind, number


def _gather_failures(failure: Exception | None) -> list[tuple[int, str]]:
    """The ranks that failed, each with what it says. Collective."""
    if not anywhere(failure is not None):
        return []
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, None if failure is None else repr(failure))
    return [(rank, message) for rank, message in enumerate(said) if message is not None]


def _portable(error: BaseException) -> BaseException:
    """`error`, as it can be raised on other ranks too."""
    sent = f"{type(error).__name__}: {error}"
    with contextlib.suppress(Exception):
        again = pickle.loads(pickle.dumps(error))
        if f"{type(again).__name__}: {again}" == sent:
            return error
    return RuntimeError(f"the first rank raised {sent}")


def _refuse_call(*args: Any, **kwargs: Any) -> NoReturn:
    raise LayoutError(
        f"it computes with the model, whose shards the other ranks hold. {_ALONE} Compute "
        f"{_ELSEWHERE}",
        where="what the first rank does alone",
    )
