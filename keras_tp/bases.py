"""What is known of each layer of a model before any of them is called."""

from __future__ import annotations

from dataclasses import dataclass

import keras

from keras_tp.computations import Computation
from keras_tp.plans import VariablePlan
from keras_tp.rules import Weight, computation_of
from keras_tp.seam.layers import Owner, variables_of, walk_layers

# These call their cell or layer once per time step: what it gathers is gathered
# once, around all the steps.
REPEATING = (keras.layers.RNN, keras.layers.TimeDistributed)


@dataclass(frozen=True)
class Basis:
    """What is known of a layer before anything is found out by calling it.

    Attributes:
        owner: the layer.
        own: numbers of its variables.
        computation: what it computes with them, if it may be planned by that.
        why_not: if not, why.
        weights: its variables, by the names that the computation gives them.
        held: numbers of sharded variables of layers below that it gathers for them.
        gathers: numbers of all that it gathers if it computes with full weights.
    """

    owner: Owner
    own: list[int]
    computation: Computation | None
    why_not: str
    weights: dict[str, Weight]
    held: list[int]
    gathers: tuple[int, ...]


def bases_of(owners: list[Owner], plans: list[VariablePlan], index: dict[int, int]) -> list[Basis]:
    """Those of all layers of a model, in the same order."""
    # Variable index -> the layer that gathers it, where that is not its owner.
    gathered_by: dict[int, Owner] = {}
    bases = []
    for owner in owners:
        if isinstance(owner.layer, REPEATING):
            for variable in variables_of(walk_layers(owner.layer)):
                if plans[index[id(variable)]].sharded:
                    gathered_by.setdefault(index[id(variable)], owner)
        bases.append(_basis(owner, plans, index, gathered_by))
    return bases


def _basis(
    owner: Owner,
    plans: list[VariablePlan],
    index: dict[int, int],
    gathered_by: dict[int, Owner],
) -> Basis:
    own = [index[id(v)] for v in owner.variables]
    computation, why_not = computation_of(owner.layer)
    names = _names(owner, index, computation)
    if computation is not None and not set(computation.weights) <= set(names):
        computation, why_not = None, "its weights belong to another layer"
    above = next((gathered_by[i] for i in own if i in gathered_by), owner)
    if above is not owner:
        computation = None
        why_not = f"every time step needs it, so '{above.path}' gathers it once around them all"
    weights = {name: Weight(plans[i].shape, plans[i].layout) for name, i in names.items()}
    # What this layer gathers for the cell below it.
    held = [i for i, by in gathered_by.items() if by is owner and i not in own]
    mine = [i for i in own if plans[i].sharded and gathered_by.get(i, owner) is owner]
    return Basis(owner, own, computation, why_not, weights, held, (*mine, *held))


def _names(owner: Owner, index: dict[int, int], computation: Computation | None) -> dict[str, int]:
    """Names the layer's own variables: as its computation does, else by the variable's name."""
    left = {id(variable): variable for variable in owner.variables}
    names = {}
    for name in computation.weights if computation else ():
        variable = left.pop(id(getattr(owner.layer, name)), None)
        if variable is not None:
            names[name] = index[id(variable)]
    for variable in left.values():
        i = index[id(variable)]
        names[variable.name if variable.name not in names else f"{variable.name}_{i}"] = i
    return names
