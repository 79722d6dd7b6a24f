"""What a sharded variable is read as: a full tensor that is gathered once it is used."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_iter, tree_map_only

from keras_tp.errors import LayoutError


class FullWeight(torch.Tensor):
    """The full value of a sharded variable, gathered by whatever computes with it.

    Whoever reads a variable computes with its full value, in a loss, a
    regularizer, a custom training step. But shapes are known without a gather,
    and what is there for optimizers belongs to this rank's shard: `grad`, hooks
    on it, `torch.autograd.grad`. Writing into it would be lost, and is an error.

    Args:
        variable: a `ShardedVariable`.
        tracked: False for what `detach()` gives.
    """

    _variable: Any
    _tracked: bool

    @staticmethod
    @torch.compiler.disable
    def __new__(cls, variable: Any, tracked: bool = True) -> FullWeight:
        local = variable._value
        weight = torch.Tensor._make_wrapper_subclass(
            cls, tuple(variable.shape), dtype=local.dtype, device=local.device
        )
        weight._variable = variable
        weight._tracked = tracked
        return weight

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        weight = args[0] if args and isinstance(args[0], cls) else None
        if weight is not None:
            if func in _OF_THE_GRADIENT and weight._tracked:
                return func(weight._variable._value, *args[1:], **kwargs)
            if func in _OF_THE_SHAPE:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            if func in _DETACHED:
                return cls(weight._variable, tracked=False)
        if func is torch.autograd.grad:
            args, kwargs = tree_map_only(cls, lambda w: w._variable._value, (args, kwargs))
            return func(*args, **kwargs)
        written = _written(func, args, kwargs)
        for leaf in tree_iter(written):
            if isinstance(leaf, cls):
                raise write_error(leaf._variable.path, f"torch's {getattr(func, '__name__', func)}")
        full: dict[int, torch.Tensor] = {}

        def gathered(w: FullWeight) -> torch.Tensor:
            if id(w) not in full:
                full[id(w)] = w._gather()
            return full[id(w)]

        args, kwargs = tree_map_only(cls, gathered, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, *args: Any, **kwargs: Any
    ) -> Any:
        raise TypeError(f"{func} came by a sharded weight without gathering it")

    def _gather(self) -> torch.Tensor:
        if self._tracked:
            return self._variable.full()
        with torch.no_grad():
            return self._variable.full()

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        # A gather would wait for the ranks that do not print.
        return f"<FullWeight of '{self._variable.path}', shape={tuple(self.shape)}>"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return FullWeight, (self._variable, self._tracked)

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        return self._gather().detach().clone()


def write_error(path: str, where: str) -> LayoutError:
    """The error for writing into a gathered weight."""
    return LayoutError(
        f"'{path}' is sharded: what is written into the full weight is lost. Use "
        "variable.assign(...), which takes a full value.",
        where=where,
    )


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments that `func` writes into."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    if in_place or name in _IN_PLACE:
        return args[:1]
    return kwargs.get("out")


_TENSOR: Any = torch.Tensor  # whose class attributes its stubs do not have


def _getters(*names: str) -> set[Any]:
    return {getattr(_TENSOR, name).__get__ for name in names}


def _methods(*names: str) -> set[Any]:
    return {getattr(_TENSOR, name) for name in names}


# What the shard answers.
_OF_THE_GRADIENT = {
    *_getters("grad", "is_leaf", "requires_grad"),
    *(_TENSOR.grad.__set__, _TENSOR.grad.__delete__, _TENSOR.requires_grad.__set__),
    *_methods("requires_grad_", "retain_grad"),
    *_methods("register_hook", "register_post_accumulate_grad_hook"),
}
# What is known without any value. (A gradient of what is detached is None.)
_OF_THE_SHAPE = {
    *_getters("shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes"),
    *_getters("grad", "grad_fn", "is_leaf", "requires_grad"),
    *_getters("is_cpu", "is_cuda", "is_meta", "is_sparse", "is_quantized", "is_nested"),
    *_methods("size", "dim", "ndimension", "numel", "nelement", "element_size", "__len__"),
    *_methods("is_floating_point", "is_complex"),
    *(torch.numel, torch.is_floating_point, torch.is_complex),
}
_DETACHED = {*_getters("data"), *_methods("detach")}
_OPERATORS = "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"
_IN_PLACE = {"__set__", "__setitem__", *(f"__i{name}__" for name in _OPERATORS)}
