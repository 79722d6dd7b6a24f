"""Paths that differ only in numbers, and a pattern for all of them that claims no other."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from keras_tp.patterns import MATCHES_PARTS, match_paths

Value = TypeVar("Value")
# For each part of a path, what stands between its numbers; and the numbers, "" for none at the end.
Stems = tuple[tuple[str, ...], ...]
Places = tuple[tuple[str, ...], ...]


def patterns_for(meant: Mapping[str, Value], paths: Iterable[str]) -> dict[str, Value]:
    """Patterns that claim of `paths` exactly those in `meant`, each for its value.

    Blocks that repeat share a pattern: names that differ in numbers, and by Keras's custom in
    whether there is one, as in `dense`, `dense_1`. If any number would claim too much, the pattern
    lists those that are meant, and if that would, each path stands for itself.

    Args:
        meant: a value for each path.
        paths: all paths that there are.
    """
    everything = list(dict.fromkeys(paths))
    alike: dict[tuple[Stems, Value], dict[str, Places]] = {}
    by_stems: dict[Stems, dict[str, Places]] = {}
    read = {path: _read(path) for path in everything}
    for path, (stems, places) in read.items():
        by_stems.setdefault(stems, {})[path] = places
    for path, value in meant.items():
        stems, places = read[path]
        alike.setdefault((stems, value), {})[path] = places
    made: dict[str, Value] = {}
    for (stems, value), family in alike.items():
        made |= dict.fromkeys(_patterns(stems, family, by_stems[stems]), value)
    if MATCHES_PARTS:
        claims = match_paths(list(made), everything)
        got = {path: made[pattern] for path, pattern in claims.pattern_of.items()}
        if claims.problems or got != dict(meant):
            made = {f"^{pattern}$": value for pattern, value in made.items()}
    return made


def _read(path: str) -> tuple[Stems, Places]:
    stems, places = [], []
    for part in path.split("/"):
        base, end = re.fullmatch(r"(.*?)(_\d+)?", part, re.DOTALL).groups(default="")  # type: ignore[union-attr]
        pieces = re.split(r"(\d+)", base)
        stems.append(tuple(pieces[::2]))
        places.append((*pieces[1::2], end))
    return tuple(stems), tuple(places)


def _patterns(stems: Stems, family: dict[str, Places], all_of_them: dict[str, Places]) -> list[str]:
    """Patterns of a family, and of no other path; one that has other stems none of them claims."""
    others = [places for path, places in all_of_them.items() if path not in family]
    for listed in (False, True):
        parts, taken = [], []
        for number, texts in enumerate(stems):
            seen = zip(*(places[number] for places in family.values()), strict=True)
            distinct = [list(dict.fromkeys(each)) for each in seen]
            taken.append([_takes(each, listed) for each in distinct])
            numbers = [_number(each, listed) for each in distinct]
            texts = tuple(re.escape(text) for text in texts)
            parts.append("".join(t + n for t, n in zip(texts, numbers, strict=True)))
        if not any(
            all(
                takes(text)
                for each, place in zip(taken, places, strict=True)
                for takes, text in zip(each, place, strict=True)
            )
            for places in others
        ):
            return ["/".join(parts)]
    return [re.escape(path) for path in family]


def _takes(seen: list[str], listed: bool) -> Callable[[str], object]:
    """Whether the pattern of `_number` takes a number, or none, in that place."""
    if len(seen) == 1 or listed:
        return set(seen).__contains__
    return bool if "" not in seen else lambda text: True


def _number(seen: list[str], listed: bool) -> str:
    """A pattern of the numbers seen in one place."""
    if len(seen) == 1:
        return seen[0]
    if listed:
        return f"({'|'.join(seen)})"
    if not any(text.startswith("_") for text in seen):
        return r"\d+"
    return r"(_\d+)?" if "" in seen else r"_\d+"
