"""A second oracle: Keras's own tensor parallelism, on JAX, with the same LayoutMap.

`test_parity` and `test_layers` compare with Keras on torch in one process. What both sides of
that comparison share, Keras's torch backend and torch, cannot show there.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import jax_oracle
import numpy as np
import oracle_cases
import parity
import pytest
from oracle_cases import CASES, MESHES

import keras_tp

pytestmark = pytest.mark.slow

# Adam makes whole steps of what is rounding noise: the gradient of the bias of attention keys. All
# else is nearer yet.
ALLOWED = 1e-11


@pytest.fixture(scope="session")
def jax_results(tmp_path_factory: Any) -> Path:
    """The folder of what JAX gives, from one process for all cases. Without JAX, an error."""
    folder = tmp_path_factory.mktemp("jax")
    done = subprocess.run(
        [sys.executable, jax_oracle.__file__, str(folder)],
        env={**os.environ, **jax_oracle.ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def on_ranks(name: str, mesh: str) -> tuple[dict[str, Any], list[str]]:
    """This rank's results, and the layer outputs that have a layout in the plan."""
    case = CASES[name]
    with parity.real_float64():
        model = oracle_cases.built(case)
        with warnings.catch_warnings():
            # Outputs stay whole here and not on JAX: to the same numbers.
            warnings.filterwarnings("ignore", ".* changes nothing", keras_tp.LayoutWarning)
            plan = keras_tp.plan(model, case.layout_map(mesh))
        keras_tp.parallelize(model, plan=plan)
        result = oracle_cases.trained(model, case)
    local = keras_tp.local_shapes(model)
    result |= {f"local {w.path}": np.array(local[w.path]) for w in model.weights}
    return result, sorted(f"{layer.path}/output" for layer in plan.layers if layer.output_layout)


def read(folder: Path, name: str, mesh: str) -> tuple[dict[str, Any], list[str]]:
    """JAX's results, and the layer outputs that it laid out."""
    with np.load(jax_oracle.file(folder, name, mesh)) as file:
        result = dict(file)
    return result, result.pop("outputs with a layout").tolist()


def parts(result: dict[str, Any]) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Numbers, and the shapes of the shards."""
    shapes = {name: tuple(v) for name, v in result.items() if name.startswith("local ")}
    return {name: v for name, v in result.items() if name not in shapes}, shapes


def differences(one: dict[str, Any], many: dict[str, Any]) -> dict[str, float]:
    """Those that are too large. The names, and so the weights and their order, are the same."""
    assert list(one) == list(many)
    gaps = {name: parity.difference(one[name], many[name]) for name in one}
    return {name: gap for name, gap in gaps.items() if not gap < ALLOWED}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", CASES)
def test_the_numbers_are_those_of_keras_on_jax(
    ranks: Any, jax_results: Path, name: str, mesh: str
) -> None:
    """Finds what parity on torch cannot: a layout read otherwise than Keras reads it, and numbers
    that are wrong with and without keras_tp alike. A copy whose backward does not reduce, put in
    once, failed it in the cases with a column layer that is not the first."""
    alone, whole = parts(read(jax_results, name, jax_oracle.ALONE)[0])
    result, outputs = read(jax_results, name, mesh)
    sharded, shards = parts(result)
    assert shards != whole
    assert not differences(alone, sharded)
    answers = ranks(math.prod(MESHES[mesh].values()))(on_ranks, name, mesh)
    for ours, named in answers:
        numbers, shapes = parts(ours)
        assert shapes == shards
        assert not differences(alone, numbers)
        assert not differences(sharded, numbers)
        assert named == outputs
    assert outputs == (["model/down/output", "model/up/output"] if name == "layer output" else [])
