"""What is done around a training step, on each mesh: the table that the tests print at their end.

A test runs a group of features in one call of the ranks, each against one process, and
hands what every rank found to `note`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from keras_tp.tables import plain_table, render

MESHES = {
    "model=2": {"model": 2},
    "batch=2": {"batch": 2},
    "batch=2 model=2": {"batch": 2, "model": 2},
}
EXACT = 1e-10  # of what float64 can show; relative

# Of a feature: the largest difference from one process, what is allowed, and why if it is more.
Found = tuple[float, float, str]


def exact(difference: float) -> Found:
    return difference, EXACT, ""


def classes_of(module: Any, base: type) -> set[str]:
    """Names of the classes of a module of Keras, but for the one that all derive from."""
    return {n for n, kind in vars(module).items() if inspect.isclass(kind)} - {base.__name__}


def note(
    record_property: Callable[[str, object], None],
    group: str,
    mesh: str,
    answers: Sequence[Mapping[str, Found]],
) -> None:
    """Asserts what every rank found, and hands it to the table."""
    assert len({tuple(answer) for answer in answers}) == 1
    for feature in answers[0]:
        for rank, (difference, allowed, why) in enumerate(a[feature] for a in answers):
            assert difference <= allowed, (feature, mesh, f"rank {rank}", difference)
            assert why or allowed <= EXACT, f"{feature}: say why {allowed} is allowed"
        _, allowed, why = answers[0][feature]
        record_property(
            "feature", [group, feature, mesh, f"{allowed:.0e}" if why else "exact", why]
        )


def note_worst(
    record_property: Callable[[str, object], None],
    group: str,
    mesh: str,
    feature: str,
    answers: Sequence[Mapping[str, float]],
) -> None:
    """Asserts that every rank found each difference exact, and hands them on as one feature."""
    for rank, found in enumerate(answers):
        wrong = {name: difference for name, difference in found.items() if not difference <= EXACT}
        assert not wrong, (mesh, f"rank {rank}", wrong)
    note(
        record_property,
        group,
        mesh,
        [{feature: exact(max(found.values()))} for found in answers],
    )


def draw(noted: Sequence[Sequence[str]]) -> str:
    """The table of what the tests that passed have noted."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    reasons: dict[str, str] = {}
    for group, feature, mesh, said, why in noted:
        letter = reasons.setdefault(why, chr(ord("a") + len(reasons))) if why else ""
        rows.setdefault((group, feature), {})[mesh] = f"{said} {letter}".rstrip()
    table: Any = plain_table("around the step", "", *MESHES)
    last = ""
    for (group, feature), cells in rows.items():
        table.add_row(group if group != last else "", feature, *(cells.get(m, "-") for m in MESHES))
        last = group
    return "\n".join(
        [
            render(table),
            f"exact: to {EXACT:.0e} of one process, in float64, on every rank",
            *(f"{letter}: {why}" for why, letter in reasons.items()),
        ]
    )
