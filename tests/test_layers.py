"""The matrix: every dim of every weight of many layers, sharded alone and together, on each mesh.

Same numbers or a refusal. What is found is compared with the page
`tests/layers.md`, which `make layers` writes.
"""

from __future__ import annotations

import functools
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import parity
import pytest
from layer_cases import CASES, floats
from matrix import (
    MESHES,
    PAGE,
    WAYS,
    Cell,
    alone_on,
    looked_at,
    on_page,
    page,
    rows_of,
    ways_on,
)

import keras_tp


def layouts_of(
    weights: list[tuple[str, tuple[int, ...]]], axes: list[str], alone: bool, ways: Sequence[str]
) -> Iterator[tuple[str, str, dict[str, tuple[str | None, ...]]]]:
    """Which weight, what of it, and a layout map.

    Of several axes the last cuts the dim that is asked about and the first the
    dim after it, so that each dim is cut by each.
    """
    main, other = axes[-1], axes[0] if len(axes) > 1 else None

    def cut(rank: int, dim: int) -> tuple[str | None, ...]:
        if other is not None and rank == 1:
            return (other,)
        beside = (dim + 1) % rank
        return tuple(main if d == dim else other if d == beside else None for d in range(rank))

    if alone:
        for path, shape in weights:
            for dim in range(len(shape)):
                yield path, str(dim), {exactly(path): cut(len(shape), dim)}
    shaped = [(path, len(shape)) for path, shape in weights if shape]
    for what, pick in (
        ("first", lambda i, n: 0),
        ("last", lambda i, n: n - 1),
        ("mixed", lambda i, n: i % n),
    ):
        layout = {exactly(path): cut(n, pick(i, n)) for i, (path, n) in enumerate(shaped)}
        if what in ways:
            yield "all", what, layout


def exactly(path: str) -> str:
    """The pattern of one path, also in Keras 3.13, where a pattern may match a part of it."""
    return f"^{re.escape(path)}$"


@functools.cache
def plain(name: str) -> tuple[parity.Case, parity.Run, list[tuple[str, tuple[int, ...]]]]:
    """The case trained by one process, once for all layouts."""
    case = CASES[name]
    # Not of the model that is trained: some layers remember how often they were called.
    outputs = parity.build_seeded(case.build)(case.inputs)
    # Two steps: of the second, momentum and the weights that the first has left are part.
    trained = parity.Case(case.build, (case.inputs, floats(*outputs.shape)), steps=2)
    model = parity.build_seeded(case.build)
    weights = [(w.path, tuple(w.shape)) for w in model.weights if "seed" not in w.path]
    return trained, parity.once(lambda: parity.train(model, trained)), weights


def measure(name: str, mesh: str, alone: bool, ways: Sequence[str] = WAYS) -> list[Cell]:
    """Trains the case once for each layout of the matrix. Runs on every rank.

    Args:
        alone: whether weights are also sharded one by one.
        ways: in which all weights are sharded at once.
    """
    axes = MESHES[mesh]
    with parity.real_float64():
        case, one, weights = plain(name)
        cells = []
        alone &= CASES[name].alone
        for weight, what, layout in layouts_of(weights, list(axes), alone, ways):
            model = parity.build_seeded(case.build)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", keras_tp.LayoutWarning)
                try:
                    plan = parity.planned(model, parity.layout_map(layout, axes))
                except keras_tp.LayoutError as error:
                    cells.append(Cell(weight, what, "refused", 0.0, str(error)))
                    continue
            report = parity.compare_with(one, case, model, plan)
            assert report.sharded == len(layout), (weight, what)
            cells.append(Cell(weight, what, report.styles, report.worst(), ""))
        return cells


def matrix() -> list[Any]:
    """Each case on each mesh; those that only `make layers` looks at are slow."""
    return [
        pytest.param(
            name,
            mesh,
            id=f"{name}-{mesh.replace('=', '').replace(' ', '')}",
            marks=[] if ways_on(name, mesh) else pytest.mark.slow,
        )
        for name in CASES
        for mesh in MESHES
    ]


@pytest.mark.parametrize(("name", "mesh"), matrix())
def test_every_dim_of_every_weight(
    ranks: Any, name: str, mesh: str, record_property: Any, request: Any
) -> None:
    """Keras nightly is silently wrong for attention sharded on head_dim or the contracted dim
    (which KerasHub's maps do: keras-hub #2827), and crashes for convolutions, vocabulary-sharded
    embeddings and grouped attention; keras-hub #1613 is one KV head on two ranks; nanotron #172
    had a wrong input gradient on all ranks but one. `test_breaks.py` breaks the code in these and
    other ways and sees these comparisons fail."""
    writing = request.config.getoption("--write-layers")
    alone = writing or alone_on(name, mesh)
    ways = WAYS if writing else ways_on(name, mesh) or WAYS
    ask = ranks(math.prod(MESHES[mesh].values()))
    answers = ask(measure, name, mesh, alone, ways, timeout=300.0)
    for cells in answers:
        for cell in cells:
            assert cell.difference < 1e-10, cell
        assert [cell.outcome for cell in cells] == [cell.outcome for cell in answers[0]]
    rows = rows_of(answers[0])
    record_property("matrix", [name, mesh, rows])
    if not writing:
        rows_there = [row for row in on_page(name, mesh) if alone or row[0] == "all"]
        wanted = [looked_at(row, ways) for row in rows_there]
        assert rows == wanted, "if this is right, `make layers`"


def test_the_page_has_no_other_rows() -> None:
    """A layer that is no longer tested, and a promise that nobody checks."""
    assert PAGE.read_text() == page({n: {m: on_page(n, m) for m in MESHES} for n in CASES})
