"""What `keras_tp.verify` found, as frozen values and as a table."""

from __future__ import annotations

from dataclasses import dataclass

from keras_tp.tables import plain_table, render


@dataclass(frozen=True)
class LayerCheck:
    """What was found in one layer, the same on every rank.

    Attributes:
        path: the layer's path.
        style: how it computes, e.g. `"column"`.
        calls: how often the batch called it; the differences are the largest of all.
        output: largest difference of its outputs, and of losses it adds, on any
            rank, relative to the largest value of each and to how much rounding
            is multiplied there (`keras_tp.rounding`).
        input_gradient: likewise of the gradients of its inputs, given the same
            random gradients of its outputs; 0 where no input has one.
        weight_gradient: likewise of the gradients of its weights, of which each
            rank compares its shard.
        finite: whether all numbers were; infinities and NaN in the same places
            count as equal.
        differentiable: whether there were gradients to compare; a stateful RNN
            writes what it reads, and has none.
        tolerance: what rounding may make, by the dtype that the layer computes in.
    """

    path: str
    style: str
    calls: int
    output: float
    input_gradient: float
    weight_gradient: float
    finite: bool
    differentiable: bool
    tolerance: float

    @property
    def worst(self) -> float:
        """The largest difference."""
        return max(self.output, self.input_gradient, self.weight_gradient)

    @property
    def equal(self) -> bool:
        """Whether all differences are within the tolerance."""
        return self.worst <= self.tolerance


@dataclass(frozen=True)
class Verification:
    """What `keras_tp.verify` found; print it for a table.

    Attributes:
        layers: one entry for each layer that computes with sharded weights and
            that the batch called, in the order of the first calls.
        model: the same for the model as a whole, its own losses included.
        unequal_weights: variables that are not the same on every rank that
            should hold the same, in words.
        not_called: paths of layers with sharded weights that the batch did not call.
    """

    layers: tuple[LayerCheck, ...]
    model: LayerCheck
    unequal_weights: tuple[str, ...]
    not_called: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether everything is equal, to rounding."""
        checks = (*self.layers, self.model)
        return not self.unequal_weights and all(check.equal for check in checks)

    @property
    def first_difference(self) -> LayerCheck | None:
        """The first layer that is not equal to itself on gathered weights."""
        return next((check for check in (*self.layers, self.model) if not check.equal), None)

    def __str__(self) -> str:
        table = plain_table(
            "layer", "style", "calls", "output", "input gradient", "weight gradient", "",
            whole=("style",),
        )  # fmt: skip
        first = self.first_difference
        for check in (*self.layers, self.model):
            mark = "equal" if check.equal else "DIFFERENT"
            mark += "" if check.finite else ", with inf or nan"
            mark += "" if check.differentiable else ", no gradients"
            table.add_row(
                check.path,
                check.style,
                str(check.calls),
                *(f"{d:.1e}" for d in (check.output, check.input_gradient, check.weight_gradient)),
                f"{mark}, the first" if check is first and check is not self.model else mark,
            )
        lines = [f"not the same on every rank: {text}" for text in self.unequal_weights]
        lines += [f"not called by this batch: {path}" for path in self.not_called]
        return render(table, "\n".join([*lines, "", self._verdict()]))

    def _verdict(self) -> str:
        first = self.first_difference
        if first is not None:
            return (
                f"different: first in '{first.path}', by {first.worst:.1e} where rounding may make "
                f"{first.tolerance:.0e}."
            )
        if self.unequal_weights:
            return "different: ranks do not hold the same weights."
        worst = max(check.worst for check in (*self.layers, self.model))
        return f"equal to rounding on every rank: {worst:.1e} at most."
