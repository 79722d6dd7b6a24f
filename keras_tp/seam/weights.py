"""What a sharded variable is read as: a full tensor that is gathered once it is used."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_iter, tree_map, tree_map_only

from keras_tp.errors import LayoutError


class FullWeight(torch.Tensor):
    """The full value of a sharded variable, gathered by whatever computes with it.

    Whoever reads a variable computes with its full value, in a loss, a
    regularizer, a custom training step. But shapes are known without a gather,
    and what is there for optimizers belongs to this rank's shard: `grad`, hooks
    on it, `torch.autograd.grad`. Writing into it would be lost, and is an error.
    """

    _variable: Any
    _tracked: bool

    @classmethod
    def of(cls, variable: Any) -> FullWeight:
        """What reading `variable`, a `ShardedVariable`, gives."""
        return _Tracked.apply(variable._value, variable)

    @classmethod
    @torch.compiler.disable
    def make(cls, variable: Any, tracked: bool) -> FullWeight:
        """Without a graph; `tracked` is False for what `detach()` gives."""
        local = variable._value
        weight = without_storage(cls, tuple(variable.shape), local)
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
            if func in OF_THE_GRADIENT and weight._tracked:
                answer = func(weight._variable._value, *args[1:], **kwargs)
                return weight if answer is weight._variable._value else answer
            if func in OF_THE_SHAPE:
                return of_the_tensor(func, args, kwargs)
            if func in _DETACHED:
                return cls.make(weight._variable, tracked=False)
        if func is torch.autograd.grad:
            args, kwargs = tree_map_only(cls, lambda w: w._variable._value, (args, kwargs))
            return func(*args, **kwargs)
        given = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, cls)]
        path = given[0]._variable.path
        name = getattr(func, "__name__", str(func))
        if any(isinstance(leaf, cls) for leaf in tree_iter(written(func, args, kwargs))):
            raise write_error(path, f"torch's {name}")
        full: dict[Any, torch.Tensor] = {}  # each weight is gathered once, however often given

        def gathered(leaf: FullWeight) -> torch.Tensor:
            key = id(leaf._variable), leaf._tracked
            if key not in full:
                full[key] = leaf._gather()
            return full[key]

        args, kwargs = tree_map_only(cls, gathered, (args, kwargs))
        return _only_read(func(*args, **kwargs), full.values(), path, name)

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

    # A gather on the one rank that prints would wait for the others.

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"<FullWeight of '{self._variable.path}', shape={tuple(self.shape)}>"

    def __format__(self, spec: str) -> str:
        return repr(self)

    def __dir__(self) -> list[str]:
        return dir(torch.Tensor)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise LayoutError(
            f"'{self._variable.path}' is sharded: pickled, it would be one rank's shard. Use "
            "variable.numpy() or keras_tp.full_weights(model), on every rank.",
            where="this use of pickle",
        )

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        return self._gather().detach().clone()


class _Tracked(torch.autograd.Function):
    """Ties a FullWeight to the shard, for what computes with it behind `__torch_function__`.

    Such as an autograd function of the user's: the gradient that it gives for
    its input is the full weight's.
    """

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, variable: Any) -> FullWeight:
        ctx.variable = variable
        return FullWeight.make(variable, tracked=True)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return ctx.variable._sharding.local(grad), None


def without_storage(cls: Any, shape: tuple[int, ...], like: torch.Tensor) -> Any:
    """A tensor of a class of its own that has no values; dtype and device are those of `like`."""
    return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)


def of_the_tensor(func: Any, args: Any, kwargs: Any) -> Any:
    """What torch's function answers of tensors of classes of their own, as of any tensors."""
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


class WeightView(torch.Tensor):
    """A view of a gathered weight, which may be read, but not written: that would be lost."""

    _path: str

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        views = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, cls)]
        for leaf in tree_iter(written(func, args, kwargs)):
            if isinstance(leaf, cls) and func not in OF_THE_GRADIENT:
                raise write_error(leaf._path, f"torch's {name}")
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        return result if func in OF_THE_SHAPE else _only_read(result, views, views[0]._path, name)


def was_written(weight: torch.Tensor) -> bool:
    """Whether something was written into a gathered weight since it was gathered."""
    with torch._C.DisableTorchFunctionSubclass():
        return not weight.is_inference() and weight._version > 0


def version_of(tensor: torch.Tensor) -> int:
    """A number that grows whenever something is written into `tensor`."""
    return tensor._version


def state_of(tensor: torch.Tensor) -> tuple[int, int]:
    """What changes if `tensor` is written into, or given other memory while this is still held."""
    return tensor._version, tensor.untyped_storage()._cdata


def _only_read(result: Any, sources: Collection[torch.Tensor], path: str, name: str) -> Any:
    """The result of torch's `name`, in which the memory of `sources` cannot be written."""
    if any(map(was_written, sources)):
        raise write_error(path, f"torch's {name}")
    if isinstance(result, np.ndarray):
        result.flags.writeable = False
        return result
    with torch._C.DisableTorchFunctionSubclass():
        memory = {source.untyped_storage().data_ptr() for source in sources}

        def guarded(leaf: Any) -> Any:
            if type(leaf) is not torch.Tensor or leaf.is_meta or leaf.layout != torch.strided:
                return leaf
            if leaf.untyped_storage().data_ptr() not in memory:
                return leaf
            view = leaf.as_subclass(WeightView)
            view._path = path
            return view

        return tree_map(guarded, result)


def write_error(path: str, where: str) -> LayoutError:
    """The error for writing into a gathered weight."""
    return LayoutError(
        f"'{path}' is sharded: what is written into the full weight is lost. Use "
        "variable.assign(...), which takes a full value.",
        where=where,
    )


def written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments that `func` writes into."""
    name = getattr(func, "__name__", "").split(".")[0]
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
OF_THE_GRADIENT = {
    *_getters("grad", "is_leaf", "requires_grad"),
    *(_TENSOR.grad.__set__, _TENSOR.grad.__delete__, _TENSOR.requires_grad.__set__),
    *_methods("requires_grad_", "retain_grad"),
    *_methods("register_hook", "register_post_accumulate_grad_hook"),
}
# What is known without any value. (A gradient of what is detached is None.)
OF_THE_SHAPE = {
    *_getters("shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes"),
    *_getters("grad", "grad_fn", "is_leaf", "requires_grad"),
    *_getters("is_cpu", "is_cuda", "is_meta", "is_sparse", "is_quantized", "is_nested"),
    *_methods("size", "dim", "ndimension", "numel", "nelement", "element_size", "__len__"),
    *_methods("is_floating_point", "is_complex", "stride", "is_contiguous", "get_device"),
    *(torch.numel, torch.is_floating_point, torch.is_complex),
}
_DETACHED = {*_getters("data"), *_methods("detach")}
_OPERATORS = "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"
_IN_PLACE = {"__set__", "__setitem__", *(f"__i{name}__" for name in _OPERATORS)}
