"""What is given on the command line, understood or refused."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def mesh_of(given: str) -> dict[str, int]:
    """Axes and sizes, as in `batch=8,model=8`."""
    sizes: dict[str, int] = {}
    for part in given.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if not name or not size.isdecimal() or int(size) < 1:
            raise argparse.ArgumentTypeError(f"{part!r} is not an axis and a size, as in model=8")
        if name in sizes:
            raise argparse.ArgumentTypeError(f"names axis {name!r} twice")
        sizes[name] = int(size)
    return sizes


def shapes_of(given: str) -> list[tuple[int, ...]]:
    """Shapes of inputs, as in `64,1024:64,16`."""
    shapes = []
    for shape in given.split(":"):
        sizes = [size.strip() for size in shape.split(",")]
        if not all(size.isdecimal() and int(size) > 0 for size in sizes):
            raise argparse.ArgumentTypeError(f"{shape!r} is not a shape, as in 64,1024")
        shapes.append(tuple(map(int, sizes)))
    return shapes


def number_of(unit: str) -> Callable[[str], float]:
    """What takes a number of which there is something."""

    def check(given: str) -> float:
        try:
            number = float(given)
        except ValueError:
            number = 0.0
        if not 0 < number < float("inf"):
            raise argparse.ArgumentTypeError(f"{given!r} is not a number of {unit}")
        return number

    return check


def file_with(ending: str) -> Callable[[str], str]:
    """What takes a path with this ending, in a folder that is there."""

    def check(path: str) -> str:
        if not path.lower().endswith(ending):
            raise argparse.ArgumentTypeError(f"{path!r} does not end in {ending}")
        if not Path(path).absolute().parent.is_dir():
            raise argparse.ArgumentTypeError(f"{path!r} is in a folder that is not there")
        return path

    return check
