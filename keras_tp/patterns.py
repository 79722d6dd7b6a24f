"""Which pattern of a LayoutMap claims which variable, and what was misspelt.

The rule is that of the installed Keras (`LayoutMap.__getitem__`): a key equal to
the path wins, otherwise the one key that matches it; two such keys are an error.
A regex matches the whole path (`re.fullmatch`); until Keras 3.13, part of it
(`re.search`).
"""

from __future__ import annotations

import contextlib
import difflib
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras


def _matches_parts() -> bool:
    """Whether the installed Keras lets a pattern match a part of a path."""
    probe = keras.distribution.LayoutMap(None)
    probe["b"] = keras.distribution.TensorLayout(())
    return probe["abc"] is not None


MATCHES_PARTS = _matches_parts()
# Seconds that all patterns have together, and that each has at least.
PATIENCE, LEAST = 2.0, 0.05


@dataclass
class Claims:
    """Outcome of matching every pattern against every path.

    Attributes:
        pattern_of: path -> the pattern that claims it, for the claimed ones.
        unused: patterns that match no path, in the map's order.
        problems: ambiguous paths, and patterns that are no valid regex or take too long to match.
    """

    pattern_of: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def match_paths(patterns: Sequence[Any], paths: Sequence[str]) -> Claims:
    """Matches `patterns`, the keys of a LayoutMap, against variable `paths`."""
    claims = Claims()
    matchers: dict[str, Callable[[str], Any]] = {}
    for pattern in patterns:
        if not isinstance(pattern, str):
            claims.problems.append(f"pattern {pattern!r} is not a string.")
            continue
        try:
            regex = re.compile(pattern)
        except re.error as error:
            claims.problems.append(f"pattern {pattern!r} is not a valid regex: {error}.")
        else:
            matchers[pattern] = regex.search if MATCHES_PARTS else regex.fullmatch
    matching: dict[str, list[str]] = {path: [] for path in paths}
    slow: set[str] = set()
    end = time.monotonic() + PATIENCE
    for pattern, match in matchers.items():
        try:
            with _at_most(max(end - time.monotonic(), LEAST)):
                claimed = [path for path in matching if match(path)]
        except TimeoutError:
            claims.problems.append(
                f"pattern {pattern!r} takes too long to match: repeats of repeats, such as (a+)+, "
                "try all ways to share out a path. Repeat one thing once, such as [^/]+ or .*."
            )
            slow.add(pattern)
            claimed = []
        for path in claimed:
            matching[path].append(pattern)
    used = set()
    for path, found in matching.items():
        if path in matchers:
            found = [path]
        used.update(found)
        if len(found) == 1:
            claims.pattern_of[path] = found[0]
        elif found:
            claims.problems.append(
                f"{path!r} is matched by {len(found)} patterns: "
                f"{', '.join(map(repr, found))}. Narrow them until one is left."
            )
    claims.unused = [pattern for pattern in matchers if pattern not in used | slow]
    return claims


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raises TimeoutError if it is open for longer.

    A regex cannot be stopped but by a signal, and a signal comes to the main thread only: elsewhere
    there is no limit.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(
        signal, "setitimer"
    ):
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError

    handler = signal.signal(signal.SIGALRM, stop)
    began = time.monotonic()
    left, again = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        if left:  # somebody else's alarm
            left = max(left - (time.monotonic() - began), 1e-3)
        signal.setitimer(signal.ITIMER_REAL, left, again)
        signal.signal(signal.SIGALRM, handler)


def nearest(pattern: str, paths: Sequence[str], count: int = 3) -> list[str]:
    """The paths most like what `pattern` seems to mean, best first.

    Regex punctuation is dropped and only as many trailing parts of a path are
    compared as the pattern spells out, so `'.*qkv/kernel'` finds
    `'block/attention/query/kernel'`.
    """
    literal = re.sub(r"\\.|\[[^\]]*\]|[.*+?^$(){}|\\]", "", pattern).strip("/")
    parts = literal.count("/") + 1
    tails: dict[str, list[str]] = {}
    for path in dict.fromkeys(paths):
        tails.setdefault("/".join(path.split("/")[-parts:]), []).append(path)
    close = difflib.get_close_matches(literal, tails, n=count, cutoff=0.4)
    return [path for tail in close for path in tails[tail]][:count]
