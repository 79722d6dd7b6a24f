"""What one training step costs by a plan, before it is launched: memory and communication.

The model is called, and its gradients are computed, once, as one rank would: on tensors of
that rank's shapes that have no values (torch's meta device), with functions in place of
the collectives that write down what they would send. So a gradient that nobody wants is not
sent here either, and a layer that is called twice sends twice.

Exact, to the byte: the collectives of forward, backward, the update and the metrics. Measured:
the peak of activations, of what torch would hold on CPUs. `Cost.notes` says what is not counted.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from keras_tp.costs import StoredBytes, slots_of, stored_bytes
from keras_tp.dry_steps import DryStep, Found, layers_named
from keras_tp.errors import LayoutError
from keras_tp.ledger import Traffic
from keras_tp.optimizers import inner_optimizers
from keras_tp.plans import Plan, VariablePlan
from keras_tp.problems import check_model
from keras_tp.seam.layers import variables_of, walk_layers
from keras_tp.seam.metrics import has_metrics
from keras_tp.seam.rehearsals import is_computed_again
from keras_tp.seam.steps import has_loss


@dataclass(frozen=True)
class Cost:
    """The price of one training step on one rank; `print` it for a table.

    Attributes:
        rank: whose; the first stores and computes as much as any.
        ranks: how many there are.
        batch: the shapes of the whole batch, in words.
        stored: bytes that stay from step to step: parameters, gradients, optimizer slots.
        activations: bytes that come on top of them at most, in forward, backward and metrics:
            what layers keep for backward, weights gathered for a call or on their way to the next
            ones, inputs, outputs, the loss.
        traffic: the collectives of a step, by phase, kind, axis, layer and what travels.
        flops: floating-point operations of the rank's forward and backward (and metrics):
            matrix products, convolutions and attention.
        notes: what is not counted, or not exactly, a sentence each.
    """

    rank: int
    ranks: int
    batch: str
    stored: StoredBytes
    activations: int
    traffic: tuple[Traffic, ...]
    flops: int
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        """Bytes in the fullest moment of forward, backward and metrics."""
        return self.stored.total + self.activations

    def collectives(self, phase: str) -> Counter[str]:
        """How many collectives of each kind there are in `phase` of a step."""
        counts: Counter[str] = Counter()
        for traffic in self.traffic:
            if traffic.phase == phase:
                counts[traffic.kind] += traffic.count
        return counts

    @property
    def sent(self) -> float:
        """Bytes that the rank sends in a step, if ranks stand in rings; see `Traffic.sent`."""
        return sum(traffic.sent for traffic in self.traffic)

    def seconds(self, bandwidth: float) -> float:
        """How long a step communicates.

        Args:
            bandwidth: bytes per second that a rank sends, while it receives as many. One for
                all axes; latency, which a hundred small collectives are made of, is not in it.
        """
        return self.sent / bandwidth

    def share(
        self,
        bandwidth: float,
        *,
        step_seconds: float | None = None,
        flops_per_second: float | None = None,
    ) -> float:
        """The share of a step that communication would take, were nothing done meanwhile.

        That is `seconds(bandwidth)` of the step: of one that takes `step_seconds` altogether, or
        of one that takes the time to communicate and that to compute `flops` at so many a
        second. What is sent while a rank computes (gradients in buckets) hides some of it.

        Args:
            bandwidth: as for `seconds`.
            step_seconds: what a step takes, communication included.
            flops_per_second: what a rank does; give one of the two.

        Returns:
            From 0 to 1; more than 1 where a step cannot be as quick as `step_seconds`.
        """
        if (step_seconds is None) == (flops_per_second is None):
            raise ValueError("give either step_seconds or flops_per_second.")
        seconds = self.seconds(bandwidth)
        if step_seconds is None:
            assert flops_per_second is not None
            step_seconds = seconds + self.flops / flops_per_second
        return seconds / step_seconds if seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All of it in lists, dicts, strings and numbers, ready for `json.dumps`."""
        found = asdict(self) | {"peak": self.peak, "sent": self.sent}
        found["traffic"] = [asdict(t) | {"sent": t.sent} for t in self.traffic]
        found["notes"] = list(self.notes)
        return found

    def __str__(self) -> str:
        from keras_tp.price_tables import cost_table

        return cost_table(self)


def price(
    plan: Plan,
    model: Any,
    batch: Any,
    *,
    targets: Any = None,
    sample_weight: Any = None,
    rank: int | None = None,
) -> Cost:
    """What one training step of `model` costs by `plan`.

    Needs no process group, no device and no memory: the model may be one whose weights have
    no values, planned for ranks there are not. It is as before afterwards.

    A step is Keras's `train_step` on a whole batch, not compiled: forward, loss, backward, the
    update of the optimizer and that of the metrics that the model is compiled with.

    Args:
        plan: made for this model.
        model: a built model that is not parallelized.
        batch: the shape of the whole batch, of all replicas: a tuple of ints, or for several
            inputs a list or dict of such, as the model takes them. Or a batch itself, arrays
            of which only shapes and dtypes matter.
        targets: what the loss and metrics are given besides outputs: shapes (of floats), or
            arrays. With None these are not counted, nor what they take for memory, and backward
            begins at the outputs.
        sample_weight: what weighs them, as `fit` takes it: shapes, or arrays. It wants targets.
        rank: which rank's; by default the first, which stores and computes as much as any.

    Raises:
        LayoutError: a plan of another model, or a model that is parallelized.
        ValueError: a batch that does not fit the model, targets without a loss, or a rank that
            the mesh lacks.
        Exception: what the model raises where it cannot be called without values.

    Example:
        >>> plan = keras_tp.plan(model, layout_map)
        >>> print(plan.cost(model, (64, 128)))
        >>> plan.cost(model, x[:64], targets=y[:64]).share(50e9, flops_per_second=400e12)
    """
    check_model(model)
    _check_fits(plan, model)
    rank = plan.mesh.ranks[0] if rank is None else rank
    if rank not in plan.mesh.ranks:
        raise ValueError(f"the mesh ({plan.mesh}) has no rank {rank}.")
    if targets is not None and not has_loss(model):
        raise ValueError("targets are for the loss, and the model is compiled with none.")
    if targets is None and sample_weight is not None:
        raise ValueError("sample_weight weighs what is done with targets: give both.")
    try:
        slots, unknown = slots_of(model), ""
    except ValueError as error:
        slots, unknown = None, f"{error} "
    found = DryStep(plan, model, rank).run(batch, targets, slots, sample_weight)
    return Cost(
        rank=rank,
        ranks=plan.mesh.size,
        batch=_in_words(batch),
        stored=stored_bytes(plan, rank, 2 if slots is None else slots),
        activations=found.activations,
        traffic=found.traffic,
        flops=found.flops,
        notes=tuple(_notes(plan, model, targets, found, unknown)),
    )


def _check_fits(plan: Plan, model: Any) -> None:
    owners = walk_layers(model)
    variables = [(v.path, tuple(v.shape)) for v in variables_of(owners)]
    layers = [(owner.path, type(owner.layer).__name__) for owner in owners]
    same = variables == [(v.path, v.shape) for v in plan.variables]
    if not same or layers != [(layer.path, layer.kind) for layer in plan.layers]:
        raise LayoutError("it was made for another model.", where="this plan")


def _in_words(batch: Any) -> str:
    if isinstance(batch, dict):
        return ", ".join(f"{name} {_in_words(entry)}" for name, entry in batch.items())
    if hasattr(batch, "shape"):
        return str(tuple(batch.shape))
    if all(type(size) is int for size in batch):
        return str(tuple(batch))
    return ", ".join(map(_in_words, batch))


def _notes(plan: Plan, model: Any, targets: Any, found: Found, unknown: str) -> list[str]:
    owners = walk_layers(model)
    optimizer = getattr(model, "optimizer", None)
    notes = _notes_on_outputs(plan, model, targets, found)
    if optimizer is None:
        notes.append(
            "the model is compiled with no optimizer: two slots for each trained variable are "
            "counted, as Adam's, and no update."
        )
    elif unknown:
        notes.append(f"{unknown}Two slots for each trained variable are counted.")
    if optimizer is not None and len(inner_optimizers(optimizer)) > 1:
        notes.append("of several optimizers the first is taken to update all variables.")
    if plan.batch_axis is not None and not found.shared:
        notes.append("there are fewer rows than replicas: each computes all of them.")
    again = layers_named(owners, is_computed_again)
    if again:
        notes.append(f"{again[0]!r} is computed again in backward, which may send more than this.")
    constrained = [v for v in _sharded(plan, model) if v[0].constraint is not None]
    if constrained:
        path = constrained[0][1].path
        notes.append(f"what the constraint of {path!r} gathers after an update is not counted.")
    notes.append(
        "not counted: the temporaries of the optimizer's update; comparisons of batches and rows "
        "on the 1st, 2nd, 4th, ... batch; callbacks, one small collective a batch. A compiled step "
        "is another. Attention is taken to be one kernel, as torch's is on CPUs."
    )
    return notes


def _notes_on_outputs(plan: Plan, model: Any, targets: Any, found: Found) -> list[str]:
    """What is not counted of the loss and the metrics."""
    heads = [layer.path for layer in plan.layers if any(style.open for style in layer.styles)]
    if targets is None:
        shard = (
            f", and communicate about that of {heads[0]!r}, which stays a shard" if heads else ""
        )
        wanted = "give targets" if has_loss(model) else "compile the model with them, give targets"
        return [
            f"the loss and metrics are not counted: {wanted} (in the shell --targets). They keep "
            f"tensors of the size of the outputs{shard}."
        ]
    if heads and not has_metrics(model):
        return [
            "the model is compiled with no metrics, and none are counted: they would communicate "
            f"about the output of {heads[0]!r}, which stays a shard."
        ]
    return [
        f"{_named_metric(name)} wants values, and is counted up to there only: {error}"
        for name, error in found.uncounted.items()
    ]


def _named_metric(name: str) -> str:
    return f"`{name}`" if name == "compute_metrics" else f"the metric {name!r}"


def _sharded(plan: Plan, model: Any) -> list[tuple[Any, VariablePlan]]:
    variables = variables_of(walk_layers(model))
    return [(v, p) for v, p in zip(variables, plan.variables, strict=True) if p.sharded]
