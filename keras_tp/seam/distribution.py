"""What is put into Keras so that `keras.distribution` works on torch, and how it is taken out.

Patched by `install`, put back by `uninstall`:

- `keras.src.backend.distribution_lib`, the module a backend brings, is None on
  torch. `keras.src.distribution.distribution_lib` has imported that name, and
  everything public in `keras.distribution` goes by it.
- `Variable.__init__` and `_deferred_initialize` of `keras.src.backend.common.
  variables`, after which a variable has its value. On JAX a variable looks for
  its layout there; on torch nobody does. What stands in a `StatelessScope` gets
  its value by the second, outside of every name scope.
- `uniform` and `truncated_normal` of `keras.src.backend.torch.random` make
  three and nine times what they return: see `thrift.py`.

Read, and never written: `ModelParallel._layout_map`, and the name scopes that
are open, which hold the object that makes a variable. `Variable._layout` is
where Keras keeps a layout, until 3.14 on JAX alone, and
`Optimizer.add_variable_from_reference` hands it on.

What layers and optimizers need to work with sharded variables (`hook_layers`,
`hook_optimizers`) is made with the first one, and stays.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import keras
import keras.src.backend as backend
import torch
from keras.src.backend.common import global_state
from keras.src.backend.common.variables import Variable as KerasVariable
from keras.src.backend.torch import random as torch_random
from keras.src.distribution import distribution_lib as public

from keras_tp.seam.thrift import thrifty_truncated_normal, thrifty_uniform
from keras_tp.seam.variables import is_symbolic


class Role(enum.Enum):
    """What a new variable is for."""

    WEIGHT = "claimed by the patterns of a layout map"
    STATE = "whole, and the same on every rank"
    RECORD = "whole, and starts from a constant: what metrics and optimizers keep"


# (owner, name, what stood there), in the order of patching; empty while not installed.
_PATCHED: list[tuple[Any, str, Any]] = []
_ROLE = "_keras_tp_role"


def install(
    library: ModuleType,
    prepare: Callable[[Any], None],
    place: Callable[[Any, Role, bool], None],
) -> None:
    """Has Keras use `library`, and have `place` put each new variable where it belongs. Idempotent.

    Args:
        library: the module that takes the place of a backend's `distribution_lib`.
        prepare: called with the current distribution before a variable is made under it.
        place: called with a variable that has its value, its role, and whether
            the value is in memory of its own.

    Raises:
        RuntimeError: this Keras is not as expected.
    """
    if _PATCHED:
        return
    _check_keras()

    def patch(owner: Any, name: str, value: Any) -> None:
        _PATCHED.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    patch(backend, "distribution_lib", library)
    patch(public, "distribution_lib", library)
    patch(KerasVariable, "__init__", _placed_init(KerasVariable.__init__, prepare, place))
    deferred = KerasVariable._deferred_initialize
    patch(KerasVariable, "_deferred_initialize", _placed_deferred(deferred, prepare, place))
    patch(torch_random, "uniform", thrifty_uniform(torch_random.uniform))
    patch(torch_random, "truncated_normal", thrifty_truncated_normal(torch_random.truncated_normal))


def uninstall() -> None:
    """Puts back what `install` found. Variables that are sharded stay so. Idempotent."""
    while _PATCHED:
        owner, name, before = _PATCHED.pop()
        setattr(owner, name, before)


def _check_keras() -> None:
    wanted = [
        (backend, "distribution_lib"),
        (public, "distribution_lib"),
        (KerasVariable, "_deferred_initialize"),
        (KerasVariable, "_initialize_with_initializer"),
        (torch_random, "uniform"),
        (torch_random, "truncated_normal"),
    ]
    missing = [f"{owner.__name__}.{name}" for owner, name in wanted if not hasattr(owner, name)]
    found = f"keras_tp.enable() is for Keras 3.13 to 3.15, and found Keras {keras.__version__}"
    if missing:
        raise RuntimeError(f"{found}, without {', '.join(missing)}.")
    if backend.distribution_lib is not None:
        raise RuntimeError(
            f"{found}, which brings a keras.distribution for torch of its own "
            f"({backend.distribution_lib.__name__}). Two of them would shard a variable twice: use "
            "that one without keras_tp.enable(), or an older Keras with it."
        )


def _placed_init(original: Any, prepare: Callable[[Any], None], place: Any) -> Any:
    @functools.wraps(original)
    def init(self: Any, initializer: Any, *args: Any, **kwargs: Any) -> None:
        current = keras.distribution.distribution()
        role = Role.STATE if isinstance(initializer, torch.nn.Parameter) else _role()
        # Before there is a value: on GPUs, joining the job says on which it is to be.
        if current is not None and not is_symbolic():
            prepare(current)
        original(self, initializer, *args, **kwargs)
        if "_layout" not in vars(self):  # until Keras 3.14 it is kept on JAX alone
            self._layout = kwargs.get("layout")
        if self._value is None:
            vars(self)[_ROLE] = role
        elif (current is not None or self._layout is not None) and not is_symbolic():
            own = callable(initializer) or isinstance(initializer, str | torch.nn.Parameter)
            place(self, role, own)

    return init


def _placed_deferred(original: Any, prepare: Callable[[Any], None], place: Any) -> Any:
    @functools.wraps(original)
    def deferred_initialize(self: Any) -> None:
        current = keras.distribution.distribution()
        if current is not None and not is_symbolic():
            prepare(current)
        original(self)
        role = vars(self).pop(_ROLE, Role.WEIGHT)
        if (current is not None or layout_of(self) is not None) and not is_symbolic():
            place(self, role, True)

    return deferred_initialize


def _role() -> Role:
    # The object whose name scope is the innermost one is what makes the variable.
    for scope in reversed(global_state.get_global_attribute("name_scope_stack") or []):
        if isinstance(scope.caller, keras.optimizers.Optimizer | keras.metrics.Metric):
            return Role.RECORD
        if isinstance(scope.caller, keras.random.SeedGenerator):
            return Role.STATE
        if scope.caller is not None:
            break
    return Role.WEIGHT


def layout_map_of(distribution: Any) -> Any:
    """The LayoutMap of a `ModelParallel`."""
    return distribution._layout_map


def layout_of(variable: Any) -> Any:
    """The `TensorLayout` that a variable was made with, or None."""
    return getattr(variable, "_layout", None)


def set_layout(variable: Any, layout: Any) -> None:
    """Remembers how a variable is stored, where Keras does."""
    variable._layout = layout
