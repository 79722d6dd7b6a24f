"""Keras layers: which there are, what they own, and where a call or a loss can be taken over."""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import keras
import torch
from keras.src.backend.torch.layer import TorchLayer
from keras.src.ops.node import Node

from keras_tp.errors import LayoutError, LayoutWarning
from keras_tp.seam.contexts import is_symbolic, reading_shards
from keras_tp.seam.variables import ShardedVariable, awaits_plan
from keras_tp.seam.weights import WeightView


@dataclass(frozen=True)
class Owner:
    """A layer and the variables it owns itself, its sublayers' not counted."""

    layer: Any
    path: str
    variables: tuple[Any, ...]

    @property
    def has_layers(self) -> bool:
        """Whether there are layers below it."""
        return bool(self.layer._layers)


def walk_layers(model: Any) -> list[Owner]:
    """The model and all layers below it, depth first, each once, in creation order.

    The order is the same on every rank; collectives rely on it.
    """
    owners: list[Owner] = []
    seen: set[int] = set()

    def visit(layer: Any) -> None:
        if id(layer) in seen:
            return
        seen.add(id(layer))
        own = [*layer._trainable_variables, *layer._non_trainable_variables]
        own += [generator.state for generator in layer._seed_generators]
        owners.append(Owner(layer, layer.path or layer.name, _unique(own) if own else ()))
        for sublayer in layer._layers:
            visit(sublayer)

    visit(model)
    return owners


def variables_of(owners: Iterable[Owner]) -> tuple[Any, ...]:
    """All variables that `owners` own, each once, in their order."""
    return _unique(v for owner in owners for v in owner.variables)


def by_path(model: Any) -> list[tuple[str, Any]]:
    """All variables of a model with their paths, of which each further one has a number."""
    seen: dict[str, int] = {}
    named = []
    for v in variables_of(walk_layers(model)):
        seen[v.path] = seen.get(v.path, 0) + 1
        named.append((v.path if seen[v.path] == 1 else f"{v.path}#{seen[v.path]}", v))
    return named


def states_of(owners: Iterable[Owner]) -> tuple[Any, ...]:
    """The variables that a call may write: statistics, counts, seeds."""
    states: list[Any] = []
    for owner in owners:
        states += owner.layer._non_trainable_variables
        states += [generator.state for generator in owner.layer._seed_generators]
    return _unique(states)


def check_variables(model: Any, known: Iterable[Any], where: str) -> None:
    """Raises LayoutError if layers of `model` have variables that are not among `known`."""
    ids = {id(variable) for variable in known}
    new = [v.path for v in variables_of(walk_layers(model)) if id(v) not in ids]
    if new:
        raise LayoutError(
            f"{', '.join(map(repr, new))} came after it was parallelized, and gradients of them "
            "would be those of one replica's rows. Change a model (LoRA, quantization, new "
            "layers) before it is parallelized, or build a new one.",
            where=where,
        )


def tensors_kept(
    owners: Iterable[Owner], before: Iterable[dict[str, Any]]
) -> list[tuple[int, str]]:
    """The attributes that were set to other tensors since, each with the number of its owner.

    Args:
        owners: layers.
        before: of each, the attributes it had.
    """
    return [
        (number, name)
        for number, (owner, had) in enumerate(zip(owners, before, strict=True))
        for name, value in vars(owner.layer).items()
        if isinstance(value, torch.Tensor) and value is not had.get(name)
    ]


def metric_variables_of(owners: Iterable[Owner]) -> tuple[Any, ...]:
    """What metrics keep that layers hold, and may update in a call."""
    metrics = [metric for owner in owners for metric in getattr(owner.layer, "_metrics", ())]
    return _unique(variable for metric in metrics for variable in metric.variables)


def _unique(variables: Iterable[Any]) -> tuple[Any, ...]:
    return tuple({id(v): v for v in variables}.values())


def overrides_build(layer: Any) -> bool:
    """Whether the layer's class makes weights in a `build` of its own."""
    return type(layer).build is not keras.layers.Layer.build


_PARALLELIZED = "_keras_tp_parallelized"
_PART = "_keras_tp_part"


def mark_parallelized(model: Any, plan: Any) -> None:
    """Remembers that `model` was parallelized, even where nothing of it is sharded."""
    vars(model)[_PARALLELIZED] = plan
    for owner in walk_layers(model):
        vars(owner.layer)[_PART] = True


def is_part(layer: Any) -> bool:
    """Whether `layer` is a model that was parallelized, or was in one."""
    return _PART in vars(layer)


def plan_carried_out(model: Any) -> Any:
    """The plan by which `model` itself was parallelized, or None."""
    return vars(model).get(_PARALLELIZED)


def parallelized_part(model: Any) -> str | None:
    """Path of a layer or variable of `model` that is parallelized already, or None."""
    for owner in walk_layers(model):
        if _PARALLELIZED in vars(owner.layer):
            return owner.path
        for variable in owner.variables:
            if isinstance(variable, ShardedVariable) and not awaits_plan(variable):
                return variable.path
    return None


@contextlib.contextmanager
def calling(model: Any, call: Callable[..., Any]) -> Iterator[None]:
    """While open, `call` is done in place of the call of `model`."""
    attributes = vars(model)
    before = {"call": attributes["call"]} if "call" in attributes else {}
    attributes["call"] = call
    try:
        yield
    finally:
        del attributes["call"]
        attributes.update(before)


def observe_loss(model: Any, observe: Callable[[Any, Any], None]) -> None:
    """Has `observe(y, sample_weight)` called before each loss. Of a mere layer, nothing."""
    if not isinstance(model, keras.Model):
        return
    original = model.compute_loss
    signature = inspect.signature(original)

    @functools.wraps(original)
    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        if not is_symbolic():
            given = signature.bind(*args, **kwargs).arguments
            observe(given.get("y"), given.get("sample_weight"))
        return original(*args, **kwargs)

    model.compute_loss = compute_loss


def take_any_size(layer: Any) -> None:
    """Has a layer take inputs of any sizes: Keras would refuse a shard before `call` sees it."""
    spec = layer.input_spec
    if spec is not None and spec.axes:
        config = {**spec.get_config(), "axes": {}}
        layer.input_spec = keras.layers.InputSpec(**config)


def announce_quantize(layer: Any) -> None:
    """Has `layer.quantize` say that it makes whole weights of sharded ones."""
    original = layer.quantize

    @functools.wraps(original)
    def quantize(*args: Any, **kwargs: Any) -> Any:
        warnings.warn(
            f"'{layer.path}' is quantized after keras_tp.parallelize: its new weights are whole on "
            "every rank. Quantize a layer before, and it is sharded.",
            LayoutWarning,
            stacklevel=2,
        )
        return original(*args, **kwargs)

    layer.quantize = quantize


def hook_layers() -> None:
    """Has layers hand torch the shards of their variables as parameters. Idempotent.

    A layer that is built within another's call would hand it gathered weights.
    And a functional graph takes no view of one for a constant: it would stay as it is.
    """
    if hasattr(TorchLayer._track_variables, "_keras_tp"):
        return
    for name in ("_track_variables", "_post_track_variable"):
        setattr(TorchLayer, name, _with_shards(getattr(TorchLayer, name)))
    Node.__init__ = _without_views(Node.__init__)


def _with_shards(method: Any) -> Any:
    @functools.wraps(method)
    def with_shards(*args: Any) -> Any:
        with reading_shards():
            return method(*args)

    with_shards._keras_tp = True  # type: ignore[attr-defined]
    return with_shards


def _without_views(original: Any) -> Any:
    @functools.wraps(original)
    def init(self: Any, operation: Any, *args: Any, **kwargs: Any) -> None:
        for leaf in keras.tree.flatten((args, kwargs)):
            if type(leaf) is WeightView:
                raise LayoutError(
                    f"operation '{operation.name}' of a functional model would keep a view of "
                    f"'{leaf._path}', which is sharded, as it is now. Read the weight in the "
                    "`call` of a layer instead.",
                    where="this functional model",
                )
        original(self, operation, *args, **kwargs)

    return init


def captured_views(owners: Iterable[Owner], variables: Iterable[Any]) -> list[tuple[str, Any]]:
    """Operations of functional models among layers that hold a view of a variable's tensor.

    `ops.transpose(layer.weight)` while a functional graph is made is a constant
    of that graph, which on torch is a view of the weight's memory. Gives the
    operation's name and the variable.
    """
    operations = [
        operation for owner in owners for operation in getattr(owner.layer, "_operations", ())
    ]
    if not operations:
        return []
    by_memory = {_memory(v._value): v for v in variables if v._value.numel()}
    found = []
    for operation in operations:
        for node in operation._inbound_nodes:
            for leaf in keras.tree.flatten((node.arguments.args, node.arguments.kwargs)):
                if isinstance(leaf, torch.Tensor) and not isinstance(leaf, keras.Variable):
                    variable = by_memory.get(_memory(leaf))
                    if variable is not None:
                        found.append((operation.name, variable))
    return found


def _memory(tensor: torch.Tensor) -> int:
    """What views of one memory have in common; on the meta device there is no address."""
    return tensor.untyped_storage()._cdata
