"""A short way into layers that compute on shards, where Keras's long one does nothing for them.

`Layer.__call__` is some 700 Python calls: it converts and checks arguments, keeps paths, masks,
losses and contexts, and tells torch and itself of the call. Within another layer's call, given one
tensor of the right dtype without a mask, a layer with nothing to add comes out of all that as it
went in. Whatever is otherwise takes the long way, and so does what a compiler traces, which costs
nothing later.
"""

from __future__ import annotations

import functools
from typing import Any

import keras
import torch
from keras.src import backend
from keras.src.backend.common import global_state
from keras.src.layers.input_spec import assert_input_compatibility
from torch.nn.modules import module as torch_module

from keras_tp.seam.masks import keras_mask


def hook_calls() -> None:
    """Has layers whose `call` says that it `takes_tensor` called the short way. Idempotent."""
    original = keras.layers.Layer.__call__
    if hasattr(original, "_keras_tp"):
        return

    @functools.wraps(original)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        call = self.__dict__.get("call")
        if not getattr(call, "takes_tensor", False) or not _is_simple(self, args, kwargs):
            return original(self, *args, **kwargs)
        if self.input_spec is not None:
            assert_input_compatibility(self.input_spec, args[0], layer_name=self.name)
        return call(args[0])

    __call__._keras_tp = True  # type: ignore[attr-defined]
    keras.layers.Layer.__call__ = __call__


_HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
_EVERYWHERE = tuple(getattr(torch_module, f"_global{name}") for name in _HOOKS)


def _is_simple(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the long way leads to no more than `call`, for this one tensor."""
    within = global_state.get_global_attribute("current_call_ctx")
    if within is None or len(args) != 1 or torch.compiler.is_compiling():
        return False
    # (What is said of training would hold for layers after this one.)
    if kwargs and not (
        len(kwargs) == 1
        and "training" in kwargs
        and kwargs["training"] is getattr(within, "training", None)
    ):
        return False
    (x,), policy, has = args, layer._dtype_policy, layer.__dict__
    scope = backend.get_autocast_scope()
    return (
        type(x) is torch.Tensor
        and type(policy) is keras.dtype_policies.DTypePolicy
        and x.dtype is _FLOATS.get(policy.compute_dtype)
        and (policy.variable_dtype if scope is None else scope.dtype) == policy.compute_dtype
        and keras_mask(x) is None
        and type(layer).compute_mask is keras.layers.Layer.compute_mask
        and layer.autocast
        and layer.built
        and layer._called
        and layer.activity_regularizer is None
        and layer._remat_mode is None
        and not any(has[name] for name in _HOOKS)
        and not any(_EVERYWHERE)
        and keras.distribution.distribution() is None
    )


_FLOATS = {"float32": torch.float32, "float64": torch.float64}
_FLOATS |= {"bfloat16": torch.bfloat16, "float16": torch.float16}
