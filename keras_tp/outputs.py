"""An output of which each rank has a part, and that is gathered only by what needs it whole.

The logits of a large vocabulary are a model's largest tensor. What a loss and its metrics
compute of them is little: a maximum, a sum and one entry of each row. So inside Keras's own
steps the last layer may give its shard, wrapped in a tensor that says it is whole:

- what treats every class alone is computed on the shard, by the rules of `keras_tp.dims`;
- what goes across the classes is computed on shards where `keras_tp.crossings` knows how,
  with small collectives (Megatron-LM's vocabulary-parallel cross-entropy is one);
- for anything else the whole is gathered, once, and is what is used from then on.

So any loss and any metric has the numbers of a whole output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_iter, tree_map_only

from keras_tp.crossings import CROSSINGS, Crossing, Part
from keras_tp.dims import RULES, SIZED
from keras_tp.dry_runs import name_of
from keras_tp.flows import Applied, Flow, Operations, Unproven, elementwise, outer, tensors_in
from keras_tp.layouts import Shape
from keras_tp.likelihoods import Meeting
from keras_tp.seam.masks import keras_mask, masked
from keras_tp.seam.weights import (
    OF_THE_GRADIENT,
    OF_THE_SHAPE,
    of_the_tensor,
    without_storage,
    written,
)


class ShardedOutput(torch.Tensor):
    """A whole tensor of which this rank has an even part along one dim."""

    part: torch.Tensor
    along: int
    meeting: Meeting
    gathered: torch.Tensor | None

    @classmethod
    def of(cls, part: torch.Tensor, dim: int, meeting: Meeting) -> ShardedOutput:
        """The whole of which `part` is this rank's along `dim`; all parts are as large."""
        shape = list(part.shape)
        shape[dim] *= meeting.parts
        made = without_storage(cls, tuple(shape), part)
        made.part, made.along, made.meeting, made.gathered = part, dim, meeting, None
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = args[0] if args and isinstance(args[0], cls) else None
        if output is not None and output.gathered is None:
            if func in _TRACKED:
                return func(output.part)
            if func in OF_THE_SHAPE and func not in OF_THE_GRADIENT:
                return of_the_tensor(func, args, kwargs)
        args, kwargs = tree_map_only(
            cls, lambda t: t if t.gathered is None else t.gathered, (args, kwargs)
        )
        if any(isinstance(leaf, cls) for leaf in tree_iter((args, kwargs))):
            try:
                return _followed(func, args, kwargs)
            except Unproven:
                args, kwargs = tree_map_only(cls, whole, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, *args: Any, **kwargs: Any
    ) -> Any:
        raise TypeError(f"{func} came by a sharded output without gathering it")

    # A gather on the one rank that prints would wait for the others.

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"<ShardedOutput, shape={tuple(self.shape)}, cut along dim {self.along}>"

    def __format__(self, spec: str) -> str:
        return repr(self)


def is_sharded(value: Any) -> bool:
    """Whether a value is an output of which no rank has more than its part."""
    return isinstance(value, ShardedOutput) and value.gathered is None


def whole(output: ShardedOutput) -> torch.Tensor:
    """The output itself, gathered at the first time (one all-gather, for all ranks to make)."""
    if output.gathered is None:
        part = output.part
        with torch.set_grad_enabled(part.requires_grad or torch.is_grad_enabled()):
            output.gathered = output.meeting.whole(
                part, output.along, part.shape[output.along] * output.meeting.parts
            )
        masked(output.gathered, keras_mask(output))
    return output.gathered


def part_of(value: Any) -> Any:
    """This rank's part of a sharded output; of anything else that itself."""
    return value.part if is_sharded(value) else value


def mapped(function: Callable[[torch.Tensor], torch.Tensor], value: torch.Tensor) -> torch.Tensor:
    """What a function of rows gives, of the part of a sharded output or of a plain tensor."""
    if not isinstance(value, ShardedOutput):
        return function(value)
    if value.gathered is not None or value.along == 0:
        return function(whole(value))
    return ShardedOutput.of(function(value.part), value.along, value.meeting)


def _followed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a function gives of sharded outputs, without gathering them.

    Raises:
        Unproven: they have to be gathered.
    """
    name = name_of(func)
    if func in OF_THE_GRADIENT:
        raise Unproven("it is asked for its gradient")
    if written(func, args, kwargs) is not None:
        raise Unproven(f"{name} writes, of it or into it")
    tensors = tensors_in((args, kwargs))
    outputs = [t for t in tensors if isinstance(t, ShardedOutput)]
    if not outputs:
        raise Unproven(f"{name} has it in a place that cannot be followed")
    first = outputs[0]
    cross = CROSSINGS.get(name)
    if cross is not None and len(outputs) == 1 and args and args[0] is first:
        crossing = Crossing(
            *(name, args, kwargs, first.part, first.along, first.meeting),
            on_part=lambda: func(first.part, *args[1:], **kwargs),
        )
        result = cross(crossing)
        if isinstance(result, Part):
            return ShardedOutput.of(result.tensor, result.dim, first.meeting)
        if result is not None:
            return result
    if name in SIZED:
        return _reshaped(func, args, kwargs, first)
    return _apart(name, func, args, kwargs, outputs)


def _apart(
    name: str, func: Any, args: Any, kwargs: dict[str, Any], outputs: list[ShardedOutput]
) -> Any:
    """What a function gives that treats every class alone."""
    first, meeting = outputs[0], outputs[0].meeting
    given = tensors_in((args, kwargs))
    rule = RULES.get(name)
    if rule is None or rule is elementwise:
        from_end = first.along - first.dim()
        local = tree_map_only(torch.Tensor, lambda t: _fitting(t, from_end, first), (args, kwargs))
        with meeting.looking():
            known = rule is not None or _is_elementwise(func, *local)
        if not known:
            raise Unproven(f"{name} is not known to keep shards apart")
        result = func(*local[0], **local[1])
        if result is first.part:  # a cast to what it is: then a gather serves this one, too
            return first
        if not isinstance(result, torch.Tensor):
            raise Unproven(f"{name} gives no tensor")
        size = first.part.shape[first.along]
        if result.dim() < -from_end or result.shape[from_end] != size:
            raise Unproven(f"{name} gives another shape")
        return ShardedOutput.of(result, result.dim() + from_end, meeting)
    if len(outputs) != len(given) or any(o.meeting.axis != meeting.axis for o in outputs):
        raise Unproven(f"{name} of a shard and a whole tensor")
    flows = {id(t.part): Flow(t.along) for t in outputs}
    args, kwargs = tree_map_only(ShardedOutput, part_of, (args, kwargs))
    call = Applied(
        name, func, args, kwargs, lambda t: flows[id(t)], lambda t: tuple(t.shape), [], []
    )
    # What a rule may ask of the result are its dims, which it has on a rank as well.
    with meeting.looking():
        call.out = call.local = [tuple(t.shape) for t in _given_without_values(func, args, kwargs)]
    dims = rule(call)
    result = func(*args, **kwargs)
    made = tensors_in(result)
    pieces = []
    for tensor, dim in zip(made, dims, strict=True):
        if dim is None:
            raise Unproven(f"{name} gives a whole tensor")
        pieces.append(ShardedOutput.of(tensor, dim, meeting))
    return pieces[0] if isinstance(result, torch.Tensor) else type(result)(pieces)


def _fitting(tensor: torch.Tensor, from_end: int, first: ShardedOutput) -> torch.Tensor:
    """What of a tensor meets the part of an output element by element."""
    if isinstance(tensor, ShardedOutput):
        if tensor.along - tensor.dim() != from_end or tensor.meeting.axis != first.meeting.axis:
            raise Unproven("shards along different dims")
        return tensor.part
    if tensor.dim() < -from_end or tensor.shape[from_end] == 1:
        wanted = tensor.requires_grad and torch.is_grad_enabled()
        return first.meeting.copy(tensor) if wanted else tensor
    if tensor.shape[from_end] != first.shape[first.along]:
        raise Unproven("tensors of other sizes")
    return first.meeting.split(tensor, from_end)


def _without_values(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _given_without_values(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    args, kwargs = tree_map_only(torch.Tensor, _without_values, (args, kwargs))
    try:
        return tensors_in(func(*args, **kwargs))
    except Exception as error:  # then so it is with values, and said by what is gathered
        raise Unproven(f"it fails: {error}") from error


def _is_elementwise(func: Any, args: Any, kwargs: Any) -> bool:
    # Looked at without values, so that no random number is drawn for it.
    args, kwargs = tree_map_only(torch.Tensor, _without_values, (args, kwargs))
    try:
        with Operations() as seen:
            func(*args, **kwargs)
    except Exception:  # it needs values, or takes no such tensors: then it is not
        return False
    return seen.elementwise


def _reshaped(func: Any, args: Any, kwargs: Any, output: ShardedOutput) -> ShardedOutput:
    """A new shape: the dim that begins where the cut one begins is cut in the same blocks."""
    with output.meeting.looking():
        (result,) = _given_without_values(func, args, kwargs)
    full, out, parts = tuple(output.shape), tuple(result.shape), output.meeting.parts
    dim = output.along
    if 0 in full or result.numel() != output.numel():
        raise Unproven("a shape of another size")
    for new, size in enumerate(out):
        if outer(out, new) == outer(full, dim) and size > 1 and size % parts == 0:
            if size % full[dim] and full[dim] % size:
                break
            local: Shape = (*out[:new], size // parts, *out[new + 1 :])
            return ShardedOutput.of(output.part.reshape(local), new, output.meeting)
    raise Unproven(f"a shape {out} of {full} mixes the parts of dim {dim}")


_TENSOR: Any = torch.Tensor
_TRACKED = {getattr(_TENSOR, name).__get__ for name in ("requires_grad", "grad_fn")}
