"""Which pattern claims which path."""

from __future__ import annotations

import keras
from hypothesis import given
from hypothesis import strategies as st

from keras_tp.patterns import match_paths, nearest

PATHS = [
    "encoder/attention/query/kernel",
    "encoder/attention/key/kernel",
    "encoder/mlp/up/kernel",
    "encoder/mlp/up/bias",
    "head/kernel",
]
WORDS = st.sampled_from(
    [".*", "encoder", "/", "mlp", "up", "kernel", "head", "(query|key)", "bias"]
)


@given(patterns=st.lists(st.lists(WORDS, min_size=1, max_size=5).map("".join), unique=True))
def test_claims_are_those_of_keras(patterns: list[str]) -> None:
    """A map moved over from JAX must shard the same variables.

    Seen to fail with `re.search` on Keras 3.14 and with `re.fullmatch` on 3.13.
    """
    mesh = keras.distribution.DeviceMesh((1,), ["model"], ["cpu:0"])
    layout_map = keras.distribution.LayoutMap(mesh)
    for pattern in patterns:
        layout_map[pattern] = (None,)
    claims = match_paths(patterns, PATHS)
    for path in PATHS:
        try:
            expected = layout_map[path]
        except ValueError:
            assert any(repr(path) in problem for problem in claims.problems)
            assert path not in claims.pattern_of
        else:
            assert (path in claims.pattern_of) == (expected is not None)
            if expected is not None:
                assert layout_map._layout_map[claims.pattern_of[path]] is expected


def test_a_key_equal_to_the_path_wins() -> None:
    """Keras looks the path up before it tries regexes."""
    claims = match_paths(["head/kernel", "head/.*"], PATHS)
    assert claims.pattern_of == {"head/kernel": "head/kernel"}
    assert claims.problems == []
    assert claims.unused == ["head/.*"]


def test_broken_patterns_are_problems_not_crashes() -> None:
    """`re.error` from deep inside said nothing of the pattern's place."""
    claims = match_paths(["(", 3, "head/kernel"], PATHS)
    assert len(claims.problems) == 2
    assert "'('" in claims.problems[0]
    assert "3 is not a string" in claims.problems[1]
    assert claims.pattern_of == {"head/kernel": "head/kernel"}


def test_nearest_names_what_was_meant() -> None:
    """A renamed layer un-matches in silence elsewhere (keras-hub #2806, #2810)."""
    assert nearest(".*attention_query/kernel", PATHS)[0] == "encoder/attention/query/kernel"
    assert nearest("heads/kernel", PATHS)[0] == "head/kernel"
    assert nearest("zzz", PATHS) == []
