"""One call of a layer without values, in which layers below it hand each other shards.

The layers that may do so, the members, are not computed: what they give is known. All code in
between runs, and is watched (`keras_tp.dry_runs`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import Shard

from keras_tp.alike import Alike, name_of_member
from keras_tp.dry_runs import LostTrack, Whole
from keras_tp.flows import Flow, Unproven, even, tensors_in
from keras_tp.layouts import Shape
from keras_tp.plans import StylePlan
from keras_tp.repeats import Repeats
from keras_tp.seam.layers import Owner, variables_of
from keras_tp.seam.masks import keras_mask
from keras_tp.seam.rehearsals import bare_call, rehearsal, weights_without_values, without_values
from keras_tp.shard_runs import Local

# Why the output of a layer is gathered that is, or is part of, what the layer above gives.
LEAVES = "what is computed of it leaves the layer above"


@dataclass(frozen=True)
class Member:
    """A layer that could hand on its output as a shard, or take its input as one.

    Attributes:
        number: its own among all members.
        layer: the layer.
        style: how it computes along the axis.
        lookup: whether it looks up rows of a table (ids want no gradient).
    """

    number: int
    layer: Any
    style: StylePlan
    lookup: bool = False


@dataclass(frozen=True)
class Proof:
    """What may stay sharded in one call of a layer, and what has to be done for it.

    Attributes:
        handed: members whose output stays a shard.
        taken: members whose input comes as a shard.
        readers: for each tensor that column layers read, the members that do, in order: its
            gradient is summed once for all of them.
        summed: numbers of weights, among those of the layer and what is below it, that are used
            on shards, so that their gradients are summed over the ranks.
        divided: layers (by their number below the layer) and attributes that count what is
            sharded (heads), with the values they have for a shard.
        draws: for each dropout in turn the sharded dim of what it is given, or None.
        refused: members whose output is gathered, each with the reason.
    """

    handed: frozenset[int] = frozenset()
    taken: frozenset[int] = frozenset()
    readers: tuple[tuple[int, ...], ...] = ()
    summed: frozenset[int] = frozenset()
    divided: tuple[tuple[int, str, int], ...] = ()
    draws: tuple[int | None, ...] = ()
    refused: tuple[tuple[int, str], ...] = ()


@dataclass
class Call:
    """One call of a layer, to look at.

    Attributes:
        owners: the layer and all below it.
        call: what is called.
        args, kwargs: what it is given; of tensors only shapes and dtypes matter.
        members: of the layers below.
        parts: number of ranks.
        cut: ids of variables that are sharded, whose gradients cannot be summed besides.
        alike: what is known of calls in it that are alike; None to make all of them.
    """

    owners: list[Owner]
    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    members: Sequence[Member]
    parts: int
    cut: frozenset[int] = frozenset()
    alike: Alike | None = None


@dataclass
class Rehearsal:
    """One of the two runs of a call."""

    request: Call
    watch: Whole | Local
    divided: tuple[tuple[int, str, int], ...]
    refused: dict[int, str]
    summed: set[int]
    handed: set[int] = field(default_factory=set)
    taken: dict[int, bool] = field(default_factory=dict)
    readers: dict[int, list[int]] = field(default_factory=dict)
    draws: list[int | None] = field(default_factory=list)

    def run(self) -> None:
        """Calls the layer, and everything is as before."""
        call, watch = self.request, self.watch
        variables = variables_of(call.owners)
        weights = weights_without_values(variables)
        args, kwargs = without_values((call.args, call.kwargs), {})
        calls = [(member.layer, self.call_of(member)) for member in call.members]
        layers = [owner.layer for owner in call.owners]
        attributes = [(layers[n], name, value) for n, name, value in self.divided]
        inputs = tensors_in((args, kwargs))
        inputs += [mask for t in inputs if (mask := keras_mask(t)) is not None]
        if isinstance(watch, Local):
            for tensor in inputs:
                watch.set_flow(tensor, Flow(grad=tensor.is_floating_point(), weights=None))
            for number, (v, tensor) in enumerate(zip(variables, weights, strict=True)):
                partial = number in self.summed
                known = None if id(v) in call.cut else frozenset([number])
                flow = Flow(grad=bool(v.trainable), partial=partial, weights=known)
                watch.set_flow(tensor, flow)
        else:
            for tensor in (*inputs, *weights):
                watch.numbers.of(tensor)
        open_rehearsal = rehearsal(
            call.owners, zip(variables, weights, strict=True), calls, attributes, self
        )
        with open_rehearsal as losses, watch:
            if call.alike is not None:
                read = {
                    id(v): (number, tensor)
                    for number, (v, tensor) in enumerate(zip(variables, weights, strict=True))
                }
                self._repeat(Repeats(self, call.alike, read, losses))
            result = self.make(args, kwargs)
        if isinstance(watch, Local):
            self._check_end(watch, [result, losses])

    def _repeat(self, repeats: Repeats) -> None:
        # Blocks, as in `keras_tp.recollection`: a layer alone may be there to tell others.
        members = {id(member.layer) for member in self.request.members}
        for owner in self.request.owners[1:]:
            if owner.has_layers and id(owner.layer) not in members:
                vars(owner.layer)["call"] = repeats.gate(owner.layer, owner.layer.call)

    def make(self, args: Any, kwargs: Any) -> Any:
        """Makes the call."""
        return self.request.call(*args, **kwargs)

    def _check_end(self, watch: Local, result: Any) -> None:
        if watch.position != len(watch.events):
            raise LostTrack("on shards it does less")
        watch.check_gradients(tensors_in(result))
        for tensor in tensors_in(result):
            flow = watch.flow_of(tensor)
            if flow.local:
                watch.refuse([flow], LEAVES)

    def call_of(self, member: Member) -> Callable[..., torch.Tensor]:
        """What is called in place of a member's `call`."""
        bare = bare_call(member.layer)
        activation = None if member.lookup else member.layer.activation

        def call(inputs: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            name, watch = name_of_member(member.number), self.watch
            if isinstance(watch, Whole):
                with watch.resting():
                    y = bare(inputs, *args, **kwargs)
                watch.note(name, None, [inputs], [y])
            else:
                event = watch.next_event(name, [inputs])
                y = self.passed(watch, member, inputs, event.out[0], event.dtypes[0])
            return y if activation is None else activation(y)

        return call

    def passed(
        self, watch: Local, member: Member, x: torch.Tensor, out: Shape, dtype: torch.dtype
    ) -> torch.Tensor:
        """What a member gives for `x` on shards, of full shape `out`."""
        style, number = member.style, member.number
        flow = watch.flow_of(x)
        watch.check_gradients([x])
        taken = isinstance(style.input, Shard) and flow.dim == style.input.dim % x.dim()
        if flow.local and not taken:
            watch.refuse([flow], f"'{member.layer.path}' takes it whole, or cut along another dim")
        if self.taken.setdefault(number, taken) != taken:
            watch.refuse([flow], f"'{member.layer.path}' is called with a shard and with a whole")
        if not taken and not isinstance(style.input, Shard) and not member.lookup:
            readers = self.readers.setdefault(watch.numbers.of(x), [])
            if flow.grad and number not in readers:
                readers.append(number)
        dim, origins = self.cut_of(watch, member, out)
        shape = out if dim is None else even(out, dim, self.request.parts)
        with watch.resting():  # not a leaf, so that it may be written into
            y = torch.empty(
                shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point
            )
            y = y.clone()
        watch.set_flow(y, Flow(dim, grad=True, origins=origins, weights=None))
        return y

    def cut_of(self, watch: Local, member: Member, out: Shape) -> tuple[int | None, frozenset[int]]:
        """The dim along which what a member gives is cut, and what its shards come from."""
        style, number = member.style, member.number
        if not isinstance(style.output, Shard) or number in self.refused:
            return None, frozenset()
        dim = style.output.dim % len(out)
        try:
            even(out, dim, self.request.parts)
        except Unproven as reason:
            watch.refused[number] = str(reason)
            return None, frozenset()
        self.handed.add(number)
        return dim, frozenset([number])

    def dropout(
        self, draw: Callable[..., torch.Tensor], inputs: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """See `keras_tp.seam.rehearsals.Watch`."""
        watch = self.watch
        if watch.is_resting:
            return draw(inputs, *args, **kwargs)
        with watch.resting():
            y = draw(inputs, *args, **kwargs)
        if isinstance(watch, Whole):
            watch.note("random.dropout", None, [inputs], [y])
            return y
        event = watch.next_event("random.dropout", [inputs])
        flow = watch.flow_of(inputs)
        shaped = (args[1:2] or [kwargs.get("noise_shape")])[0]
        if flow.partial or (flow.dim is not None and shaped is not None):
            watch.refuse([flow], "dropout with a noise shape")
        elif tuple(y.shape) != (
            event.out[0] if flow.dim is None else even(event.out[0], flow.dim, self.request.parts)
        ):
            raise LostTrack("dropout of another shape")
        watch.set_flow(y, flow)
        self.draws.append(flow.dim)
        return y

    def proof(self) -> Proof:
        """What this run, in which nothing was in the way, has shown."""
        return Proof(
            handed=frozenset(self.handed),
            taken=frozenset(n for n, taken in self.taken.items() if taken),
            readers=tuple(tuple(numbers) for numbers in self.readers.values() if numbers),
            summed=frozenset(self.summed),
            divided=self.divided,
            draws=tuple(self.draws),
            refused=tuple(sorted(self.refused.items())),
        )
