"""How Keras optimizers give the one-process numbers for variables of which a rank holds a shard.

An update that treats every element alone is made on shards. One that looks at a
whole gradient or weight (a norm, a factored moment, an orthogonalisation) is made
on whole tensors, gathered for one variable at a time, of which each rank keeps its
part. Norms to clip by are summed over the shards.
"""

from __future__ import annotations

from typing import Any

import keras

from keras_tp.errors import LayoutError

ELEMENTWISE: tuple[type, ...] = (
    keras.optimizers.SGD,
    keras.optimizers.Adam,
    keras.optimizers.AdamW,
    keras.optimizers.Adamax,
    keras.optimizers.Adagrad,
    keras.optimizers.Adadelta,
    keras.optimizers.Nadam,
    keras.optimizers.RMSprop,
    keras.optimizers.Lion,
    keras.optimizers.Ftrl,
    *(  # in newer Keras
        getattr(keras.optimizers, name)
        for name in ("ScheduleFreeAdamW",)
        if hasattr(keras.optimizers, name)
    ),
)

# What an optimizer of one's own may define anew and still be given whole tensors.
_FREE = {
    "build",
    "update_step",
    "scale_loss",
    "finalize_variable_values",
    "save_own_variables",
    "load_own_variables",
    "get_config",
    "from_config",
    "variables",
}


_WRAPPERS = tuple(
    getattr(keras.optimizers, name)
    for name in ("LossScaleOptimizer", "MultiOptimizer")
    if hasattr(keras.optimizers, name)  # the second is in newer Keras
)


def inner_optimizers(optimizer: Any) -> list[Any]:
    """The optimizers to which one of Keras's wrappers hands its gradients, if any are known yet."""
    if not isinstance(optimizer, _WRAPPERS):
        return []
    inner = getattr(optimizer, "inner_optimizer", None)
    return list(optimizer.optimizers) if inner is None else [inner]


def check_optimizer(optimizer: Any) -> None:
    """Raises LayoutError if `optimizer` would not give the one-process numbers on shards."""
    problems = optimizer_problems(optimizer)
    if problems:
        raise LayoutError(problems, where="this optimizer")


def optimizer_problems(optimizer: Any) -> list[str]:
    """Why `optimizer` would not give the one-process numbers on shards; empty if it would."""
    problems = []
    for each in (optimizer, *inner_optimizers(optimizer)):
        own = _defined_anew(each)
        if own and not getattr(each, "elementwise", False):
            problems.append(
                f"optimizer {type(each).__name__} defines {', '.join(own)}, which would be given "
                "shards of gradients and weights. `build` and `update_step` are given whole ones: "
                "do it there, or, if it treats every element alone, say so with "
                "`optimizer.elementwise = True`."
            )
    return problems


def updates_elementwise(optimizer: Any) -> bool:
    """Whether the optimizer's update of an element looks at that element alone."""
    if getattr(optimizer, "elementwise", False):
        return True
    # Keras makes instances of a torch subclass of its own public class; a
    # user's subclass of one may compute anything.
    return isinstance(optimizer, ELEMENTWISE) and _is_keras(type(optimizer))


def price_of(optimizer: Any) -> str:
    """What it costs that an optimizer looks at whole tensors, in a sentence; empty if nothing."""
    wraps = isinstance(optimizer, _WRAPPERS)
    updating = inner_optimizers(optimizer) if wraps else [optimizer]
    whole = [each for each in updating if not updates_elementwise(each)]
    if not whole:
        return ""
    names = ", ".join(dict.fromkeys(type(o).__name__ for o in whole))
    said = (
        f"optimizer {names} updates whole tensors: of every sharded variable, one at a time, its "
        "value, gradient and slots are gathered at each step (an all_gather each)."
    )
    if all(_is_keras(type(o)) for o in whole):
        return said
    return said + " If it treats every element alone, say so with `optimizer.elementwise = True`."


def _is_keras(cls: type) -> bool:
    return cls.__module__.startswith("keras.")


def _defined_anew(optimizer: Any) -> list[str]:
    """What an optimizer of one's own replaces of Keras's that is called with shards."""
    return sorted(
        name
        for cls in type(optimizer).__mro__
        if not _is_keras(cls) and cls is not object
        for name, value in vars(cls).items()
        if name not in _FREE
        and not (name.startswith("__") and name.endswith("__"))
        and (callable(value) or isinstance(value, property))
        and hasattr(keras.optimizers.Optimizer, name)
    )
