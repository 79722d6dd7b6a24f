"""Layout maps at random: each ends in a plan that can be carried out, or in an error that says why.

`make test` tries some, `make fuzz` thousands.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import hypothesis
import keras
import numpy as np
import pytest
from hypothesis import strategies as st
from keras import layers

import keras_tp
from keras_tp.seam.layers import plan_carried_out

SECONDS = 5.0
AXES = ["batch", "model", "expert"]
PATHS = ["up/kernel", "up/bias", "down/kernel", "words/embeddings", "mix/kernel", "norm/gamma"]
EVIL = ["(.*)*x", "(a+)+$", "((.*)*)*!", "(.|.)*\\d\\d$", "([a-z]+/?)+#"]
BROKEN = ["(", "[", "*", "a{2,1}", "(?P<a", "\\", "+", "(?<=a*)b", "a**"]


LAYERS = st.tuples(st.sampled_from(["up", "down", "mix", "norm"]), st.booleans(), st.integers(1, 9))
# Width, size of the vocabulary, layers (kind, whether its name has a number, units), built or not.
MODELS = st.tuples(
    st.integers(1, 9), st.integers(1, 9), st.lists(LAYERS, max_size=3), st.integers(0, 9)
)


def build(width: int, words: int, kinds: list[tuple[str, bool, int]], built: int) -> Any:
    """A small model; some are not built."""
    keras.utils.clear_session(free_memory=False)
    stack: list[Any] = [layers.Embedding(words, width, name="words")]
    for number, (kind, numbered, units) in enumerate(kinds):
        name = f"{kind}_{number}" if numbered or kind in [k for k, *_ in kinds[:number]] else kind
        if kind == "norm":
            stack.append(layers.LayerNormalization(name=name))
        elif kind == "mix":
            stack.append(layers.EinsumDense("btx,xyz->btyz", (None, 2, 3), name=name))
            stack.append(layers.Reshape((-1, 6)))
        else:
            stack.append(layers.Dense(units, name=name))
    model = keras.Sequential(stack)
    if built:
        model.build((None, 4))
    return model


@st.composite
def layout_maps(draw: st.DrawFn) -> Any:
    """What Keras itself lets into a layout map."""
    names = draw(st.lists(st.sampled_from(AXES), min_size=1, max_size=3, unique=True))
    sizes = tuple(draw(st.integers(1, 5)) for _ in names)
    total = 1
    for size in sizes:
        total *= size
    devices = [f"cpu:{i}" for i in range(total)]
    if draw(st.integers(0, 9)) == 0:
        devices = draw(st.permutations(devices))
    mesh = keras.distribution.DeviceMesh(sizes, names, devices)
    made = keras.distribution.LayoutMap(mesh if draw(st.integers(0, 19)) else None)
    entry = st.sampled_from([*AXES, None, None])
    known = st.sampled_from(PATHS)
    keys = st.one_of(
        known,
        known.map(lambda path: f".*{path}"),
        known.map(lambda path: path.split("/")[0] + ".*"),
        st.sampled_from([".*", ".*kernel", ".*/.*", "", *EVIL, *BROKEN]),
        st.text(max_size=12),
        st.integers(),
        st.none(),
        st.binary(max_size=4),
        st.tuples(st.text(max_size=3)),
    )
    values = st.one_of(
        st.lists(entry, max_size=4).map(tuple),
        st.lists(entry, min_size=1, max_size=3).map(keras.distribution.TensorLayout),
        st.just((None,) * 7),
        st.none(),
        st.text(max_size=3),
        st.tuples(st.integers(), st.none()),
        st.just(("model", ("batch", "expert"))),
    )
    for _ in range(draw(st.integers(0, 5))):
        try:
            made[draw(keys)] = draw(values)
        except (ValueError, TypeError):  # Keras refuses it: twice, no layout, an unknown axis
            continue
    return made


def examined(model: Any, layout_map: Any, batch_axis: str | None, strict: bool) -> str:
    """How it ended."""
    before = [(v.path, tuple(v.shape)) for v in model.variables]
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", keras_tp.LayoutWarning)
        try:
            plan = keras_tp.plan(
                model, layout_map, strict=strict, batch_axis=batch_axis, advise=False
            )
        except keras_tp.LayoutError:
            ended = "refused"
        else:
            ended = "planned"
            assert [v.path for v in plan.variables] == [v.path for v in model.variables]
            for v in plan.variables:
                assert len(v.layout) == len(v.shape)
                assert v.pattern is None or v.pattern in layout_map
                assert all(axis is None or axis in plan.mesh.axes for axis in v.layout)
                parts = {v.local_shape(rank) for rank in plan.mesh.ranks}
                assert all(a <= b for part in parts for a, b in zip(part, v.shape, strict=True))
            assert str(plan)
    assert time.process_time() - began < SECONDS
    assert [(v.path, tuple(v.shape)) for v in model.variables] == before
    return ended


def carried_out(
    model: Any, layout_map: Any, batch_axis: str | None, strict: bool, rank: int, start: Any
) -> str:
    """How `parallelize` ended, on one of virtual ranks: as planned, or with nothing changed."""
    mesh = layout_map.device_mesh
    size = 1 if mesh is None else int(np.prod(mesh.shape))
    start(rank % size, size)
    before = [v.numpy() for v in model.variables]
    own_call = "call" in vars(model)
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", keras_tp.LayoutWarning)
        try:
            keras_tp.parallelize(model, layout_map, strict=strict, batch_axis=batch_axis)
        except keras_tp.LayoutError:
            after = [v.numpy() for v in model.variables]
            assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
            assert ("call" in vars(model)) == own_call
            assert not any(hasattr(v.value, "_keras_tp") for v in model.variables)
            return "refused"
    assert time.process_time() - began < SECONDS
    plan = plan_carried_out(model)
    found = list(keras_tp.local_shapes(model).values())
    assert found == [tuple(v.local_shape(rank % size)) for v in plan.variables]
    return "planned"


ANY = hypothesis.given(
    MODELS,
    layout_maps(),
    st.sampled_from(["batch", None, "model"]),
    st.booleans(),
    st.integers(0, 124),
)
SETTINGS: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": list(hypothesis.HealthCheck),
}


@hypothesis.settings(max_examples=150, **SETTINGS)
@ANY
def test_any_layout_map(
    fake_ranks: Any, spec: Any, layout_map: Any, batch_axis: str | None, strict: bool, rank: int
) -> None:
    """Another error than LayoutError, which says nothing of what to do; a pattern that takes for
    ever: `(.*)*x` hung until matching had a limit, and b"" was a TypeError. And a model that is
    left half sharded, or as nobody planned it."""
    model = build(*spec)
    ended = examined(model, layout_map, batch_axis, strict)
    assert carried_out(model, layout_map, batch_axis, strict, rank, fake_ranks) == ended


@pytest.mark.slow
@hypothesis.settings(max_examples=2500, **SETTINGS)
@ANY
def test_thousands_of_layout_maps(
    fake_ranks: Any, spec: Any, layout_map: Any, batch_axis: str | None, strict: bool, rank: int
) -> None:
    """The same of more."""
    model = build(*spec)
    ended = examined(model, layout_map, batch_axis, strict)
    assert carried_out(model, layout_map, batch_axis, strict, rank, fake_ranks) == ended
    hypothesis.event(ended)


@pytest.mark.parametrize("pattern", EVIL)
def test_patterns_that_backtrack(pattern: str) -> None:
    """Those that try all ways to share out a long path, and would until the sun is cold.

    Seen to hang without `_at_most`.
    """
    keras.utils.clear_session(free_memory=False)
    name = "a" * 60
    model = keras.Sequential([keras.Input((4,)), layers.Dense(4, name=name)])
    made = keras.distribution.LayoutMap(keras_tp.device_mesh({"model": 1}))
    made[pattern] = ("model", None)
    assert examined(model, made, None, True) == "refused"
