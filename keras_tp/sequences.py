"""Proves what of a call may be computed on shards of the sequence, by two runs without values.

Between the parts of a model that compute on shards of weights, norms, dropout and residuals treat
each token alone (Korthikanti et al. 2022, section 4.2.2). So a row layer's output need not be
the same on every rank: each may have the sum of its own tokens, until a column layer
reads all. Here one call of the outermost layer is run on the whole, and then again with such
shards, which are followed function by function (`keras_tp.tokens`). What stands in the way of
one is looked for among the layers that are called: it is given whole tensors the next time, or
gives them (`keras_tp.gates`). The runs are repeated until nothing stands in the way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import torch
from torch.distributed.tensor import Partial, Shard

from keras_tp.dry_runs import LostTrack, Whole
from keras_tp.flows import Flow
from keras_tp.gates import CUT, JOIN, KEEP, SEQUENCE, SUM, Converted, Passage, gated
from keras_tp.layouts import Shape
from keras_tp.regions import shortened
from keras_tp.rehearsal import LEAVES, Call, Member, Proof, Rehearsal
from keras_tp.seam.layers import variables_of
from keras_tp.seam.rehearsals import is_computed_again
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
    Decisions,
    Tokens,
)


@dataclass(frozen=True)
class Outer:
    """A call of the outermost layer, and what is known of it.

    Attributes:
        call: the call; its members are all along the axis.
        regions: numbers of layers within which members hand each other shards of features.
        handed: members that do so.
        divided: attributes that count what is sharded there; see `Proof.divided`.
    """

    call: Call
    regions: frozenset[int]
    handed: frozenset[int]
    divided: tuple[tuple[int, str, int], ...]


@dataclass(frozen=True)
class SequenceProof:
    """What of a call is computed on shards of the sequence.

    Attributes:
        inner: what layers hand each other besides, along features.
        passages: what goes through gates, in order.
        made: what gates make of tensors, in order: the layer, whether it is leaving, and what is
            made. (Who is given the same tensor shares it.)
        scattered: members that scatter the sum that is their output.
        gathered: members whose input was gathered for them.
        whole: layers that are given whole tensors, with the reason.
        reason: why nothing is computed so; else empty.
    """

    inner: Proof = field(default_factory=Proof)
    passages: tuple[Passage, ...] = ()
    made: tuple[tuple[int, bool, str], ...] = ()
    scattered: frozenset[int] = frozenset()
    gathered: frozenset[int] = frozenset()
    whole: tuple[tuple[int, str], ...] = ()
    reason: str = ""


def prove_sequence(outer: Outer) -> SequenceProof:
    """Finds the most that may be computed on shards of the sequence in a call."""
    call = outer.call
    if any(is_computed_again(owner.layer) for owner in call.owners):
        return SequenceProof(reason="layers are computed again in backward (RematScope)")
    refused = {m.number: "it is gathered" for m in call.members if m.number not in outer.handed}
    whole = Whole()
    try:
        _Run(call, whole, (), refused, set(), outer=outer).run()
    except Exception as error:
        return SequenceProof(reason=f"it cannot be called without values ({shortened(error)})")
    decisions = Decisions(whole=_heavy(outer))
    if any(isinstance(leaf, np.ndarray) for leaf in keras.tree.flatten((call.args, call.kwargs))):
        decisions.uncut.add(0)  # the first layers that can do so cut it
    summed: set[int] = set()
    mixed: set[int] = set()
    while True:
        before = decisions.copy()
        watch = Tokens(whole.events, call.parts, decisions, outer.regions)
        watch.mixed |= mixed
        run = _Run(call, watch, outer.divided, refused, summed, outer=outer)
        try:
            run.run()
        except Exception as error:
            reason = str(error) if isinstance(error, LostTrack) else shortened(error)
            try:
                if decisions == before:
                    watch.blame_last(reason)
            except LostTrack:
                return SequenceProof(reason=reason)
            continue
        if decisions != before:
            continue
        new = [reason for number, reason in watch.refused.items() if number not in refused]
        if new:
            return SequenceProof(reason=new[0])
        sums = (summed | watch.summed) - watch.mixed
        if sums != summed or watch.mixed != mixed:
            summed, mixed = sums, mixed | watch.mixed
        elif not run.prune():
            return run.sequence_proof(decisions)


def _heavy(outer: Outer) -> dict[int, str]:
    # To sum these gradients would cost as much as to gather activations, or more.
    mine = {id(member.layer) for member in outer.call.members}
    return {
        number: f"the gradient of its {v.name}, {tuple(v.shape)}, would have to be summed"
        for number, owner in enumerate(outer.call.owners)
        for v in owner.variables
        if number and id(owner.layer) not in mine and v.trainable and len(v.shape) > 1
    }


@dataclass
class _Run(Rehearsal):
    """One of the two runs; members compute on shards of features as in any rehearsal."""

    outer: Outer = None  # type: ignore[assignment]
    passages: list[Passage] = field(default_factory=list)
    made: list[tuple[int, bool, str]] = field(default_factory=list)
    scattered: dict[int, bool] = field(default_factory=dict)
    gathered: dict[int, bool] = field(default_factory=dict)
    started: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    sums: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    read: dict[int, set[str]] = field(default_factory=dict)  # how gates convert, by identity
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

    def sequence_proof(self, decisions: Decisions) -> SequenceProof:
        """What this run, in which nothing was in the way, has shown."""
        scattered = frozenset(number for number, yes in self.scattered.items() if yes)
        lookups = {m.number for m in self.request.members if m.lookup}
        joining = {number for number, leaving, what in self.made if what == JOIN and not leaving}
        heavy = _heavy(self.outer)
        whole = {n: r for n, r in decisions.whole.items() if n in joining or n not in heavy}
        if not scattered - lookups:
            light = [reason for number, reason in whole.items() if number not in heavy]
            reasons = [*light, *decisions.unscattered.values(), *whole.values()]
            return SequenceProof(reason=(reasons or ["no layer's output is summed"])[0])
        layers = set(gated(self.passages))
        return SequenceProof(
            inner=self.proof(),
            passages=tuple(p for p in self.passages if p.layer in layers),
            made=tuple(self.made),
            scattered=scattered,
            gathered=frozenset(number for number, yes in self.gathered.items() if yes),
            whole=tuple(sorted(whole.items())),
        )
