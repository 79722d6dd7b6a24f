"""One run of a model without values, in which layers are gates between whole tensors and shards.

It is one of the two of `keras_tp.sequences`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import keras
import torch
from torch.distributed.tensor import Partial, Shard

from keras_tp.dry_runs import LostTrack
from keras_tp.flows import Flow
from keras_tp.gates import CUT, JOIN, KEEP, SEQUENCE, SUM, Converted, Passage
from keras_tp.layouts import Shape
from keras_tp.rehearsal import LEAVES, Member, Rehearsal
from keras_tp.seam.layers import variables_of
from keras_tp.shard_runs import Local
from keras_tp.tokens import (
    ENTERED,
    GATHERED,
    LEFT,
    LOCAL,
    REGION,
    SCATTERED,
    STARTED,
    WHOLE,
    Tokens,
)


@dataclass
class TokenRun(Rehearsal):
    """One of the two runs; members compute on shards of features as in any rehearsal.

    Attributes:
        passages: what has gone through gates.
        made: what gates have made of tensors; see `keras_tp.sequences.SequenceProof`.
        scattered, gathered: of each member, whether it scatters its output, and whether its input
            was gathered for it.
        started: what was cut, with the layer that had returned it, or was called with it.
        sums: what members have scattered.
        read: how gates have converted a tensor, by its identity.
        leaving: whether the gate just now is one of a layer that returns.
    """

    passages: list[Passage] = field(default_factory=list)
    made: list[tuple[int, bool, str]] = field(default_factory=list)
    scattered: dict[int, bool] = field(default_factory=dict)
    gathered: dict[int, bool] = field(default_factory=dict)
    started: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    sums: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    read: dict[int, set[str]] = field(default_factory=dict)
    leaving: bool = False

    def __post_init__(self) -> None:
        self.converted = Converted(self._convert)
        members = {id(member.layer): member for member in self.request.members}
        self.members = {
            number: members[id(owner.layer)]
            for number, owner in enumerate(self.request.owners)
            if id(owner.layer) in members
        }
        variables = variables_of(self.request.owners)
        self.number_of = {id(v): number for number, v in enumerate(variables)}

    @property
    def tokens(self) -> Tokens:
        """What watches the second run."""
        assert isinstance(self.watch, Tokens)
        return self.watch

    def make(self, args: Any, kwargs: Any) -> Any:
        """See `Rehearsal.make`, which puts all back."""
        for number, owner in enumerate(self.request.owners[1:], 1):
            vars(owner.layer)["call"] = self._gate(number, owner.layer.call)
        return self._gate(0, self.request.call)(*args, **kwargs)

    def _gate(self, number: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not isinstance(self.watch, Tokens) or self.watch.is_resting:
                return original(*args, **kwargs)
            watch, mode = self.watch, self._mode_of(number)
            apart = watch.mode == LOCAL
            known: list[tuple[torch.Tensor, Flow]] = []

            def enter(tensor: torch.Tensor) -> torch.Tensor:
                tensor = self._entered(number, mode, tensor)
                flow = watch.flow_of(tensor)
                if mode == LOCAL and number and watch.is_sequence(flow):
                    known.append((tensor, watch.moved(tensor, ENTERED, number)))
                return tensor

            if apart:
                args, kwargs = self._through(number, False, (args, kwargs), enter)
            watch.stack.append((number, mode))
            try:
                result = original(*args, **kwargs)
            except Exception:
                watch.note_error()
                raise
            finally:
                watch.stack.pop()
            for tensor, flow in known:
                watch.set_flow(tensor, flow)
            if not apart:
                return result
            return self._through(number, True, result, lambda t: self._left(number, t))

        return call

    def _mode_of(self, number: int) -> str:
        watch = self.tokens
        if watch.mode != LOCAL:
            return watch.mode
        if number in watch.decisions.whole:
            return WHOLE
        return REGION if number in watch.decisions.given else LOCAL

    def _through(
        self, number: int, leaving: bool, nest: Any, convert: Callable[..., torch.Tensor]
    ) -> Any:
        self.leaving = leaving
        self.done: list[str] = []

        def converted(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            self.done.append(KEEP)
            return convert(leaf) if leaf.is_meta else leaf

        nest = keras.tree.map_structure(converted, nest)
        self.passages.append(Passage(number, leaving, tuple(self.done)))
        return nest

    def _entered(self, number: int, mode: str, x: torch.Tensor) -> torch.Tensor:
        """What a layer is called with."""
        watch, member = self.tokens, self.members.get(number)
        flow = watch.flow_of(x)
        if watch.is_sequence(flow):
            if member is not None and mode == LOCAL:
                columns = not isinstance(member.style.input, Shard) and not member.lookup
                return self._done(SUM if columns else JOIN, x, number)
            if mode == LOCAL:
                return x
            return self._done(SUM if mode == REGION else JOIN, x, number)
        cuts = mode == LOCAL and member is None and (number or 0 not in watch.decisions.uncut)
        if not cuts or not self._can_cut(x, flow):
            return x
        x = self._done(CUT, x, number)
        if not number:
            watch.moved(x, STARTED, number)
            self.started.append((number, x))
        return x

    def _left(self, number: int, y: torch.Tensor) -> torch.Tensor:
        """What a layer returns."""
        watch = self.tokens
        flow = watch.flow_of(y)
        if flow.partial:
            watch.refuse([flow], LEAVES)
        elif watch.is_sequence(flow):
            if not number or number in watch.decisions.gives:
                return self._done(JOIN, y, number)
            if number not in self.members:  # of which it is known why they can be refused
                watch.moved(y, LEFT, number)
        elif number and number not in watch.decisions.uncut and self._can_cut(y, flow):
            y = self._done(CUT, y, number)
            watch.moved(y, STARTED, number)
            self.started.append((number, y))
        return y

    def _can_cut(self, x: torch.Tensor, flow: Flow) -> bool:
        whole = flow.dim is None and not flow.partial and x.is_floating_point() and x.dim() == 3
        return whole and x.shape[SEQUENCE] % self.request.parts == 0

    def _done(self, what: str, x: torch.Tensor, number: int) -> torch.Tensor:
        self.done[-1] = what
        if what != CUT:
            self.read.setdefault(id(x), set()).add(what)
        return self.converted.of(what, x, number)

    def _convert(self, what: str, x: torch.Tensor, number: int) -> torch.Tensor:
        watch, parts = self.tokens, self.request.parts
        self.made.append((number, self.leaving, what))
        shape, flow = list(x.shape), watch.flow_of(x)
        if what == CUT:
            shape[SEQUENCE] //= parts
            new = Flow(SEQUENCE, flow.grad, origins=watch.origin(ENTERED, number), weights=None)
        else:
            shape[SEQUENCE] *= parts
            gathered = what == SUM and flow.grad
            origins = watch.origin(GATHERED, number) if gathered else frozenset()
            new = Flow(None, flow.grad, gathered, origins, weights=None)
        with watch.resting():
            y = torch.empty(shape, dtype=x.dtype, device="meta", requires_grad=flow.grad) * 1
        watch.numbers.same(y, x)
        watch.set_flow(y, new)
        return y

    def passed(
        self, watch: Local, member: Member, x: torch.Tensor, out: Shape, dtype: torch.dtype
    ) -> torch.Tensor:
        """See `Rehearsal.passed`."""
        assert isinstance(watch, Tokens)
        flow, number = watch.flow_of(x), member.number
        columns = not isinstance(member.style.input, Shard) and not member.lookup
        gathered = columns and watch.is_gathered(flow)
        if self.gathered.setdefault(number, gathered) != gathered:
            raise LostTrack(f"'{member.layer.path}' is called with what was gathered and what not")
        if gathered:  # whose gradient is summed where it was
            watch.flows[id(x)] = Flow(grad=flow.grad, weights=None)
        y = super().passed(watch, member, x, out, dtype)
        watch.flows[id(x)] = flow
        if self.scattered.get(number):
            self.sums.append((number, y))
        return y

    def cut_of(self, watch: Local, member: Member, out: Shape) -> tuple[int | None, frozenset[int]]:
        """See `Rehearsal.cut_of`; what is summed may be scattered."""
        assert isinstance(watch, Tokens)
        if not isinstance(member.style.output, Partial):
            return super().cut_of(watch, member, out)
        number = member.number
        reason = self._unscattered(watch, member, out)
        if self.scattered.setdefault(number, not reason) is bool(reason):
            reason = "it is called in several ways"
        if reason:
            watch.decisions.unscattered.setdefault(number, reason)
            return None, frozenset()
        bias = getattr(member.layer, "bias", None)
        if bias is not None and bias.trainable:
            watch.summed.add(self.number_of[id(bias)])
        return SEQUENCE, watch.origin(SCATTERED, number)

    def _unscattered(self, watch: Tokens, member: Member, out: Shape) -> str:
        """Why a member cannot scatter its output; empty if it can."""
        if watch.mode == WHOLE:
            return "a layer above is given whole tensors"
        if member.number in watch.decisions.unscattered:
            return watch.decisions.unscattered[member.number]
        if len(out) != 3:
            return f"its output {out} is not (batch, tokens, features)"
        if out[SEQUENCE] % self.request.parts:
            return f"{out[SEQUENCE]} tokens are not cut evenly into {self.request.parts}"
        bias = getattr(member.layer, "bias", None)
        if bias is None:
            return ""
        if id(bias) in self.request.cut:
            return "its bias is cut"
        if self.number_of[id(bias)] in watch.mixed:
            return "its bias is used elsewhere"
        return "its bias has tokens" if len(bias.shape) > 1 else ""

    def prune(self) -> bool:
        """Leaves whole what is cut only to be gathered. Says whether there was any."""
        decisions, used = self.tokens.decisions, self.tokens.used
        before = decisions.copy()
        for number, tensor in self.started:
            if id(tensor) in self.read and id(tensor) not in used:
                decisions.uncut.add(number)
        for number, tensor in self.sums:
            if self.read.get(id(tensor)) == {JOIN} and id(tensor) not in used:
                decisions.unscattered.setdefault(number, "it is read as a whole")
        return decisions != before
