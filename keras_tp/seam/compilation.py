"""What torch's compiler is told of steps with communication in them."""

from __future__ import annotations


def wait_late() -> None:
    """Has compiled graphs wait for a collective where its result is used, and not before.

    So that gradients of weights are computed while those of inputs are summed, as without a
    compiler (`keras_tp.late_gradients`). It is an option of torch's for the whole process, which
    graphs without collectives take no notice of; one that was set before is left alone.
    """
    from torch._inductor import config  # here, as it is not imported by torch

    if not config.reorder_for_compute_comm_overlap:
        config.reorder_for_compute_comm_overlap = True
        config.reorder_for_compute_comm_overlap_passes = ["sink_waits"]
