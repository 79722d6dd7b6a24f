"""Which Keras optimizers give the one-process numbers when each rank updates its own shards.

An update that treats every element alone does; one that looks at a whole
gradient or weight (a norm, a factored moment, an orthogonalisation) does not.
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
)


def check_optimizer(optimizer: Any) -> None:
    """Raises LayoutError if `optimizer` would not give the one-process numbers on shards."""
    problems = optimizer_problems(optimizer)
    if problems:
        raise LayoutError(problems, where="this optimizer")


def optimizer_problems(optimizer: Any) -> list[str]:
    """Why `optimizer` would not give the one-process numbers on shards; empty if it would."""
    problems = []
    name = type(optimizer).__name__
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return [
            f"{name} skips a step when a gradient overflows, and a rank sees its shards' only. "
            "Keras adds it for float16: use 'mixed_bfloat16', or compile(auto_scale_loss=False)."
        ]
    if not _updates_elementwise(optimizer):
        known = ", ".join(cls.__name__ for cls in ELEMENTWISE)
        problems.append(
            f"optimizer {name} is not known to update every element alone, so updating shards "
            f"could give other numbers. Known: {known}. If yours does, say so with "
            "`optimizer.elementwise = True`."
        )
    for option in ("clipnorm", "global_clipnorm"):
        if getattr(optimizer, option, None):
            problems.append(
                f"optimizer {name} has {option}={getattr(optimizer, option)}: a rank sees the "
                "norm of its shards only. Use clipvalue, or clip without sharding."
            )
    return problems


def _updates_elementwise(optimizer: Any) -> bool:
    if getattr(optimizer, "elementwise", False):
        return True
    # Keras makes instances of a torch subclass of its own public class; a
    # user's subclass of one may compute anything.
    return isinstance(optimizer, ELEMENTWISE) and type(optimizer).__module__.startswith("keras.")
