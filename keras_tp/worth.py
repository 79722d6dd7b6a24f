"""Whether a weight is worth cutting whose layer has nobody to hand a shard to.

A table of embeddings cut along its words costs an all-reduce of what it gives, and a head, the
last layer, an all-reduce of the gradient of what it takes, and a gather of what it gives unless
that stays a shard until the loss (`keras_tp.heads`). A table in reverse is a head as well.
It is worth it if what a rank need not keep then, of `COPIES` of the weight, is as many bytes as
what it communicates for `POSITIONS` positions: then even a step that computes so many
saves what it sends. A small head of few classes is not, the vocabulary of a language model is.
"""

from __future__ import annotations

import math

from keras_tp.candidates import WIDTH, WORDS, Candidate
from keras_tp.computations import Lookup
from keras_tp.heads import stays_open
from keras_tp.tables import size_text

# The weight, its gradient and two slots of the optimizer.
COPIES = 4
# Rows times tokens that a replica computes in a step.
POSITIONS = 4096


def worth_cutting(candidate: Candidate, itemsize: int) -> tuple[str, str]:
    """The label to cut a table or a head along, or "" and the price for which it is not done.

    Args:
        candidate: the layer.
        itemsize: bytes of an element of its weight, and of what it computes.
    """
    sizes = candidate.sizes
    if isinstance(candidate.computation, Lookup):
        label = WORDS if sizes[WORDS] >= candidate.parts else ""
        sent = 2 * sizes[WIDTH]
        if candidate.computation.reverse:
            sent += _gathered(sizes[WORDS], candidate.parts) + 2 * sizes[WIDTH]
    else:
        columns = candidate.columns()
        label = columns[0] if columns else ""
        given = math.prod(sizes[x] for x in candidate.outputs)
        if label and not _gathered(sizes[label], candidate.parts):
            given = 0
        sent = given + 2 * math.prod(sizes[x] for x in candidate.inputs)
    if not label:
        return "", ""
    share = (candidate.parts - 1) / candidate.parts  # of a ring's rounds, too
    numbers = sum(math.prod(shape) for shape in candidate.shapes.values())
    saved = COPIES * numbers * itemsize * share
    moved = POSITIONS * sent * itemsize * share
    if saved >= moved:
        return label, ""
    return "", (
        f"cut, a rank would keep {size_text(saved)} less ({COPIES} copies of the weight) and send "
        f"{size_text(moved)} for {POSITIONS} positions"
    )


def _gathered(columns: int, parts: int) -> int:
    """Numbers that are gathered for a position, of a head of so many columns."""
    return 0 if stays_open(columns, parts) else columns
