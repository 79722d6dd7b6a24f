"""What is put into Keras so that `keras.distribution` works on torch, and how it is taken out.

Patched by `install`, put back by `uninstall`:

- `keras.src.backend.distribution_lib`, the module a backend brings, is None on
  torch. `keras.src.distribution.distribution_lib` has imported that name, and
  everything public in `keras.distribution` goes by it.
- `Variable.__init__` and `_deferred_initialize` of `keras.src.backend.common.
  variables`, after which a variable has its value. On JAX a variable looks for
  its layout there; on torch nobody does. What stands in a `StatelessScope` gets
  its value by the second, outside of every name scope.
- `random`, the backend's module, in `keras.src.initializers.random_initializers`:
  its `uniform` and `truncated_normal` make three and nine times the memory of
  what they return, so that initializers are given others: see `thrift.py`.
- `Trainer._symbolic_build` and `make_predict_function` on torch, after which a
  model is built and about to be used, `fit`, `evaluate` and `predict`, which
  are given data, and `Distribution.distribute_dataset`.

Read, and never written: `ModelParallel._layout_map`, and the name scopes that
are open, which hold the object that makes a variable. `Variable._layout` is
where Keras keeps a layout, until 3.14 on JAX alone, and
`Optimizer.add_variable_from_reference` hands it on.

What layers and optimizers need to work with sharded variables (`hook_layers`,
`hook_optimizers`) is made with the first one, and stays, as do what saving and callbacks
need (`hook_saving`, `hook_callbacks`).
"""

from __future__ import annotations

import enum
import functools
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any, Protocol

import keras
import keras.src.backend as backend
import torch
from keras.src.backend.common import global_state
from keras.src.backend.common.variables import Variable as KerasVariable
from keras.src.backend.torch.trainer import TorchTrainer
from keras.src.distribution import distribution_lib as public
from keras.src.initializers import random_initializers

from keras_tp.seam.contexts import is_symbolic
from keras_tp.seam.thrift import ThriftyRandom


class Role(enum.Enum):
    """What a new variable is for."""

    WEIGHT = "claimed by the patterns of a layout map"
    STATE = "whole, and the same on every rank"
    RECORD = "whole, and starts from a constant: what metrics and optimizers keep"


# (owner, name, what stood there, or that it was inherited), in the order of patching; empty while
# not installed.
_PATCHED: list[tuple[Any, str, Any]] = []
_INHERITED = object()
_ROLE = "_keras_tp_role"
_DISTRIBUTION = "_keras_tp_distribution"


class Work(Protocol):
    """What is done for Keras where it asks."""

    @property
    def library(self) -> ModuleType:
        """What takes the place of a backend's `distribution_lib`."""

    def prepare(self, distribution: Any) -> None:
        """Before a variable is made under the current distribution."""

    def place(self, variable: Any, role: Role, own: bool) -> None:
        """A variable has its value, in memory of its own or not."""

    def apply(self, model: Any) -> None:
        """A model is built, and about to train or predict."""

    def feeding(self, model: Any) -> AbstractContextManager[None]:
        """Open while a model is given data."""

    def share_out(self, distribution: Any, dataset: Any) -> Any:
        """What a rank reads of a data set."""


def install(work: Work) -> None:
    """Has Keras have `work` done. Idempotent.

    Raises:
        RuntimeError: this Keras is not as expected.
    """
    if _PATCHED:
        return
    _check_keras()

    def patch(owner: Any, name: str, value: Any) -> None:
        _PATCHED.append((owner, name, vars(owner).get(name, _INHERITED)))
        setattr(owner, name, value)

    patch(backend, "distribution_lib", work.library)
    patch(public, "distribution_lib", work.library)
    patch(KerasVariable, "__init__", _placed_init(KerasVariable.__init__, work))
    deferred = KerasVariable._deferred_initialize
    patch(KerasVariable, "_deferred_initialize", _placed_deferred(deferred, work))
    patch(TorchTrainer, "_symbolic_build", _applied_when_built(TorchTrainer._symbolic_build, work))
    made = TorchTrainer.make_predict_function
    patch(TorchTrainer, "make_predict_function", _applied_before_predicting(made, work))
    for name in ("fit", "evaluate", "predict"):
        patch(TorchTrainer, name, _fed(getattr(TorchTrainer, name), work))

    def distribute_dataset(self: Any, dataset: Any) -> Any:
        return work.share_out(self, dataset)

    patch(public.Distribution, "distribute_dataset", distribute_dataset)
    patch(random_initializers, "random", ThriftyRandom())


def uninstall() -> None:
    """Puts back what `install` found. Variables that are sharded stay so. Idempotent."""
    while _PATCHED:
        owner, name, before = _PATCHED.pop()
        if before is _INHERITED:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def is_installed() -> bool:
    """Whether Keras has its work done by `install`."""
    return bool(_PATCHED)


def _check_keras() -> None:
    wanted = [
        (backend, "distribution_lib"),
        (public, "distribution_lib"),
        (KerasVariable, "_deferred_initialize"),
        (KerasVariable, "_initialize_with_initializer"),
        (TorchTrainer, "_symbolic_build"),
        (TorchTrainer, "make_predict_function"),
        (public.Distribution, "distribute_dataset"),
        (random_initializers, "random"),
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


def _placed_init(original: Any, work: Work) -> Any:
    @functools.wraps(original)
    def init(self: Any, initializer: Any, *args: Any, **kwargs: Any) -> None:
        current = keras.distribution.distribution()
        role = Role.STATE if isinstance(initializer, torch.nn.Parameter) else _role()
        # Before there is a value: on GPUs, joining the job says on which it is to be.
        if current is not None and not is_symbolic():
            work.prepare(current)
        original(self, initializer, *args, **kwargs)
        if "_layout" not in vars(self):  # until Keras 3.14 it is kept on JAX alone
            self._layout = kwargs.get("layout")
        if self._value is None:
            vars(self)[_ROLE] = role
        elif (current is not None or self._layout is not None) and not is_symbolic():
            own = callable(initializer) or isinstance(initializer, str | torch.nn.Parameter)
            work.place(self, role, own)

    return init


def _placed_deferred(original: Any, work: Work) -> Any:
    @functools.wraps(original)
    def deferred_initialize(self: Any) -> None:
        current = keras.distribution.distribution()
        if current is not None and not is_symbolic():
            work.prepare(current)
        original(self)
        role = vars(self).pop(_ROLE, Role.WEIGHT)
        if (current is not None or layout_of(self) is not None) and not is_symbolic():
            work.place(self, role, True)

    return deferred_initialize


def _applied_when_built(original: Any, work: Work) -> Any:
    @functools.wraps(original)
    def _symbolic_build(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        work.apply(self)
        return result

    return _symbolic_build


def _applied_before_predicting(original: Any, work: Work) -> Any:
    @functools.wraps(original)
    def make_predict_function(self: Any, force: bool = False) -> Any:
        result = original(self, force)
        if all(layer.built for layer in self._flatten_layers()):
            work.apply(self)
            return result
        predict = self.predict_function

        def build_and_predict(data: Any) -> Any:
            # Without compile() Keras lets the first batch build the model.
            x, _, _ = keras.utils.unpack_x_y_sample_weight(data[0])  # may be the inputs alone
            inputs = keras.tree.map_structure(_symbolic, x)
            backend.compute_output_spec(self, inputs, training=False)
            self.predict_function = predict
            work.apply(self)
            return self.predict_function(data)

        self.predict_function = build_and_predict
        return result

    return make_predict_function


def _symbolic(leaf: Any) -> Any:
    if leaf is None:
        return None
    return keras.KerasTensor(leaf.shape, backend.standardize_dtype(leaf.dtype))


def _fed(original: Any, work: Work) -> Any:
    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with work.feeding(self):
            return original(self, *args, **kwargs)

    return call


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


def distribution_of(variable: Any) -> Any:
    """The distribution that a variable was made under, or None."""
    return vars(variable).get(_DISTRIBUTION)


def set_distribution_of(variable: Any, distribution: Any) -> None:
    """Remembers what `distribution_of` gives."""
    vars(variable)[_DISTRIBUTION] = distribution


def set_layout(variable: Any, layout: Any) -> None:
    """Remembers how a variable is stored, where Keras does."""
    variable._layout = layout
