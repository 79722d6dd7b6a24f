"""Steps of a Keras model: as its `train_step` makes them, here on tensors without values."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras
import torch
from keras.src.backend.torch.core import to_torch_dtype
from keras.src.backend.torch.trainer import TorchTrainer
from keras.src.trainers.compile_utils import CompileLoss

from keras_tp.seam.contexts import stepping
from keras_tp.seam.rehearsals import META, inputs_struct


def batch_without_values(model: Any, batch: Any) -> Any:
    """Tensors on the meta device, for what a model takes.

    Args:
        model: a built model.
        batch: a nest of shapes, tuples of ints, or of arrays, as the model takes it. A shape has
            the dtype of that input, or where the model does not tell, the one it computes in.

    Raises:
        ValueError: what is neither shape nor array, or not as many as the model has inputs.
    """
    struct = inputs_struct(model)
    leaves: list[Any] = []
    nest = _collected(batch, leaves)
    dtypes = [model.input_dtype] * len(leaves)
    if struct is not None:
        wanted = keras.tree.flatten(struct)
        if len(wanted) != len(leaves):
            raise ValueError(
                f"the model has {len(wanted)} inputs, and {len(leaves)} shapes were given."
            )
        if isinstance(batch, dict) and isinstance(struct, dict):
            wanted = [struct[name] for name in batch]
        dtypes = [tensor.dtype for tensor in wanted]
        for leaf, tensor in zip(leaves, wanted, strict=True):
            _check_shape(tuple(getattr(leaf, "shape", leaf)), tuple(tensor.shape))
    made = [_empty(leaf, dtype) for leaf, dtype in zip(leaves, dtypes, strict=True)]
    return keras.tree.map_structure(lambda position: made[position], nest)


def _check_shape(given: tuple[int, ...], wanted: tuple[int | None, ...]) -> None:
    fits = [size in (None, found) for size, found in zip(wanted, given, strict=False)]
    if len(given) != len(wanted) or not all(fits):
        raise ValueError(f"an input of shape {given} was given where the model takes {wanted}.")


def like_without_values(arrays: Any) -> Any:
    """Tensors on the meta device of the shapes and dtypes of arrays, as `fit` makes them."""
    leaves: list[Any] = []
    nest = _collected(arrays, leaves)
    made = [_empty(leaf, keras.config.floatx()) for leaf in leaves]
    return keras.tree.map_structure(lambda position: made[position], nest)


def _collected(nest: Any, leaves: list[Any]) -> Any:
    """`nest` with numbers in place of its leaves, which are added to `leaves` in that order."""
    if isinstance(nest, dict):
        return {name: _collected(entry, leaves) for name, entry in nest.items()}
    is_shape = isinstance(nest, tuple | list) and all(type(size) is int for size in nest)
    if isinstance(nest, tuple | list) and not is_shape:
        return type(nest)(_collected(entry, leaves) for entry in nest)
    if not is_shape and not (hasattr(nest, "shape") and hasattr(nest, "dtype")):
        raise ValueError(f"{nest!r} is neither a shape nor an array.")
    leaves.append(nest)
    return len(leaves) - 1


def _empty(leaf: Any, dtype: Any) -> torch.Tensor:
    if isinstance(leaf, tuple | list):
        return torch.empty(tuple(leaf), dtype=to_torch_dtype(dtype), device=META)
    found = keras.backend.standardize_dtype(leaf.dtype)
    if "float" in found and not isinstance(leaf, torch.Tensor):
        found = keras.config.floatx()  # as Keras makes of NumPy's
    return torch.empty(tuple(leaf.shape), dtype=to_torch_dtype(found), device=META)


def outputs_in_training(model: Any, x: Any) -> Any:
    """What the model gives in a training step."""
    if model._call_has_training_arg:
        return model(x, training=True)
    return model(x)


def has_loss(model: Any) -> bool:
    """Whether a model is compiled with a loss."""
    return getattr(model, "_compile_loss", None) is not None


def own_loss(model: Any) -> list[tuple[Any, str, Any]]:
    """For a rehearsal: the loss that the model is compiled with once more, which it may build."""
    if not has_loss(model):
        return []
    loss = model._compile_loss
    again = CompileLoss(
        loss._user_loss, loss._user_loss_weights, loss.reduction, output_names=loss.output_names
    )
    return [(model, "_compile_loss", again)]


def loss_in_training(model: Any, x: Any, y: Any, y_pred: Any, sample_weight: Any) -> torch.Tensor:
    """The loss of a training step, penalties included."""
    loss: torch.Tensor = model._compute_loss(
        x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True
    )
    return loss


def mark_steps(model: Any) -> None:
    """Has it be known that a step of Keras's own goes on (`keras_tp.seam.contexts.in_step`).

    A step of the user's may do anything with what the model gives, on one rank alone too.
    """
    for name in ("train_step", "test_step"):
        if getattr(type(model), name, None) is getattr(TorchTrainer, name):
            setattr(model, name, _marked(getattr(model, name)))


def _marked(step: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(step)
    def marked(data: Any) -> Any:
        if torch.compiler.is_compiling():
            return step(data)
        with stepping():
            return step(data)

    return marked
