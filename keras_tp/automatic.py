"""Makes a layout map of a model: searches, prices what is left, and has the planner confirm it.

What layers hand each other as shards is cut wherever it is found (`keras_tp.searches`): it
costs what Megatron-LM's layout costs and no rank stores more. Tables of embeddings and the last
layer have nobody to hand a shard to, and are cut if they are worth it (`keras_tp.worth`).
What the planner then finds otherwise is left whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras

from keras_tp.candidates import Candidate, candidates_in
from keras_tp.errors import LayoutError
from keras_tp.families import patterns_for
from keras_tp.garbage import uncollected
from keras_tp.handovers import look_at_layers
from keras_tp.layouts import Layout, MeshShape
from keras_tp.planner import make_plan
from keras_tp.plans import Plan, itemsize
from keras_tp.problems import read_batch_axis
from keras_tp.proposals import Proposal
from keras_tp.recollection import Outcomes
from keras_tp.regions import shortened
from keras_tp.seam.layers import Owner, variables_of, walk_layers
from keras_tp.seam.likeness import Likeness
from keras_tp.searches import Group, Search
from keras_tp.worth import worth_cutting


@uncollected()
def make_layout_map(
    model: Any, mesh: Any, batch_axis: str | None = "batch", likeness: Likeness | None = None
) -> Proposal:
    """Proposes a layout map; see `keras_tp.auto_layout_map`. Adds to what is known of likeness."""
    likeness = likeness or Likeness()
    if not isinstance(mesh, keras.distribution.DeviceMesh):
        raise LayoutError(
            f"expected a keras.distribution.DeviceMesh, got {type(mesh).__name__}; "
            "`keras_tp.device_mesh({'batch': 1, 'model': 2})` makes one.",
            where="auto_layout_map(model, mesh)",
        )
    whole = make_plan(model, Proposal(mesh), batch_axis=batch_axis)  # finds what is wrong
    axis, notes = _axis_of(whole.mesh, read_batch_axis(batch_axis, whole.mesh), batch_axis)
    if axis is None:
        reason = f"the mesh ({whole.mesh}) has no axis of several ranks to cut along"
        return _proposed(mesh, whole, {}, {v.path: reason for v in whole.variables}, axis, notes)
    owners = walk_layers(model)
    candidates, reasons = candidates_in(owners, axis, whole.mesh.axis_size(axis))
    search = Search(model, candidates, likeness)
    try:
        if candidates:
            around = Outcomes(likeness).call
            look_at_layers(model, owners, search.look_at, around=around)
    except Exception as error:
        notes.append(f"the model could not be called without values ({shortened(error)}).")
        search.groups, search.heads = [], set()
        search.reasons = dict.fromkeys(candidates, "it is not known how the model calls it")
    draft = _Draft(owners, axis, whole, candidates, search, dict(reasons))
    draft.add_priced()
    while True:
        layouts = draft.layouts()
        made = _proposed(mesh, whole, layouts, draft.left(layouts), axis, notes)
        made.plan = make_plan(model, made, batch_axis=batch_axis, likeness=likeness)
        if not draft.drop_unconfirmed(made.plan):
            return made


def _axis_of(
    mesh: MeshShape, replicas: str | None, batch_axis: str | None
) -> tuple[str | None, list[str]]:
    """The axis to cut along, the largest but that of replicas, and what is said of others."""
    several = {
        axis: size
        for axis, size in zip(mesh.axes, mesh.sizes, strict=True)
        if size > 1 and axis not in (replicas, batch_axis)
    }
    if not several:
        return None, []
    axis = max(several, key=lambda name: several[name])
    notes = [
        f"nothing is cut along axis {other!r}: a proposal is for one axis, {axis!r}."
        for other in several
        if other != axis
    ]
    return axis, notes


def _proposed(
    mesh: Any,
    whole: Plan,
    layouts: Mapping[str, Layout],
    left: Mapping[str, str],
    axis: str | None,
    notes: list[str],
    plan: Plan | None = None,
) -> Proposal:
    made = Proposal(mesh)
    for pattern, layout in patterns_for(layouts, [v.path for v in whole.variables]).items():
        made[pattern] = layout
    floats = [v.path for v in whole.variables if "float" in v.dtype and v.path not in layouts]
    made.axis, made.notes = axis, tuple(notes)
    made.left = {path: left[path] for path in floats}
    made.plan = plan or whole
    return made


@dataclass
class _Draft:
    """What is to be proposed, from which is taken what cannot be.

    Attributes:
        owners: the model's layers.
        axis: the mesh axis.
        whole: the plan in which nothing is cut.
        candidates: layers that could be cut, by number.
        search: what was found.
        reasons: of layers that are left whole, why, by number.
    """

    owners: list[Owner]
    axis: str
    whole: Plan
    candidates: Mapping[int, Candidate]
    search: Search
    reasons: dict[int, str]

    def __post_init__(self) -> None:
        self.groups = list(self.search.groups)
        self.index = {id(v): i for i, v in enumerate(variables_of(self.owners))}
        for number, candidate in self.candidates.items():
            sizes = [candidate.sizes[x] for x in candidate.outputs]
            uneven = [str(size) for size in sizes if size % candidate.parts]
            reasons = []
            if len(uneven) < len(sizes):
                refused = self.search.reasons.get(number, "no layer that could be cut takes it")
                reasons.append(f"its output would be gathered: {refused}")
            if uneven:
                are = "is" if len(uneven) == 1 else "are"
                whole = " x ".join(map(str, sizes))
                reasons.append(
                    f"{', '.join(uneven)} of its output ({whole}) {are} not cut evenly into "
                    f"{candidate.parts}"
                )
            self.reasons[number] = "; ".join(reasons)

    def add_priced(self) -> None:
        """Has tables and heads be cut that are worth it."""
        settled = {n for group in self.groups for n in group.labels}
        for number, candidate in self.candidates.items():
            if number in settled or not (candidate.is_lookup or number in self.search.heads):
                continue
            weight = self.whole.variables[self._variables(candidate)[candidate.main]]
            label, price = worth_cutting(candidate, itemsize(weight.dtype))
            if label:
                self.groups.append(Group({number: label}, frozenset(), frozenset()))
            elif price:
                self.reasons[number] = price

    def layouts(self) -> dict[str, Layout]:
        """The layout of each variable that is cut, by path.

        No pattern tells two variables of one path apart: where only one would be cut, or they
        would be cut differently, none is.
        """
        layouts = {id(group): self._layouts(group) for group in self.groups}
        while True:
            by_path: dict[str, dict[int, Layout]] = {}
            for i, v in enumerate(self.whole.variables):
                by_path.setdefault(v.path, {})[i] = (None,) * len(v.shape)
            for group in self.groups:
                for i, layout in layouts[id(group)].items():
                    by_path[self.whole.variables[i].path][i] = layout
            unclear = {path for path, each in by_path.items() if len(set(each.values())) > 1}
            before = list(self.groups)
            for group in before:
                paths = {self.whole.variables[i].path for i in layouts[id(group)]}
                for path in sorted(paths & unclear):
                    self._drop(group, f"no pattern could tell it from another {path!r}")
            if self.groups == before:
                cut = {path: next(iter(each.values())) for path, each in by_path.items()}
                return {path: layout for path, layout in cut.items() if any(layout)}

    def left(self, layouts: Mapping[str, Layout]) -> dict[str, str]:
        """Why each variable is left whole that is."""
        labels = {n: label for group in self.groups for n, label in group.labels.items()}
        left = {}
        for number, owner in enumerate(self.owners):
            why = self.reasons.get(number, "")
            if number in labels:
                style = self.candidates[number].style(labels[number]).name
                why = "it is the same for all that is cut"
                if style == "row":
                    why = "it is added once, to the sum over the ranks"
            for v in owner.variables:
                if v.path not in layouts:
                    left[v.path] = why
        return left

    def drop_unconfirmed(self, plan: Plan) -> bool:
        """Leaves whole what the planner would compute otherwise; says whether there was any."""
        before = list(self.groups)
        for group in before:
            for number in group.labels:
                styles = [s for s in plan.layers[number].styles if s.axis == self.axis]
                as_meant = [
                    s.name != "gathered"
                    and s.kept == (number in group.handing)
                    and s.given == (number in group.taking)
                    for s in styles
                ]
                if as_meant != [True]:
                    self._drop(group, f"as planned, {plan.layers[number].reason}")
                    break
        return self.groups != before

    def _drop(self, group: Group, reason: str) -> None:
        if group in self.groups:
            self.groups.remove(group)
            self.reasons |= dict.fromkeys(group.labels, reason)

    def _variables(self, candidate: Candidate) -> dict[str, int]:
        layer = candidate.owner.layer
        return {name: self.index[id(getattr(layer, name))] for name in candidate.shapes}

    def _layouts(self, group: Group) -> dict[int, Layout]:
        return {
            i: self.candidates[number].layouts(label)[name]
            for number, label in group.labels.items()
            for name, i in self._variables(self.candidates[number]).items()
        }
