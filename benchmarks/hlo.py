"""The collectives of a program that XLA has compiled, which `traffic.py` cannot see."""

from __future__ import annotations

import math
import re

_COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
_ARRAY = re.compile(r"([a-z]+)(\d+)?\[([\d,]*)\]")  # f32[8,64,256]


def collectives_in(text: str, devices: int) -> list[tuple[str, int]]:
    """Kind, and bytes that a device gives to it, of each collective in the text of a program.

    >>> collectives_in("%a = f32[4,2]{1,0} all-gather(%b), channel_id=1", 2)
    [('all_gather', 16)]
    """
    found = []
    for made, kind in _COLLECTIVE.findall(text):
        count = sum(
            math.prod(int(size) for size in shape.split(",") if size) * int(bits or 8) // 8
            for _, bits, shape in _ARRAY.findall(made)
        )
        # What is written there is what it gives back.
        if kind == "all-gather":
            count //= devices
        elif kind == "reduce-scatter":
            count *= devices
        found.append((kind.replace("-", "_"), count))
    return found
