"""The command `keras-tp plan`, and the models without values that it plans."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import models
import pytest
from keras import layers
from keras.src.backend.torch import numpy as torch_numpy
from parity import layout_map

import keras_tp
from keras_tp.cli import main
from keras_tp.examples.llama_shape import llama
from keras_tp.seam.devices import without_values
from keras_tp.seam.variables import local_tensor

ROOT = Path(keras_tp.__file__).parent.parent
PROGRAM = """
import keras_tp
import keras
from keras import layers
from keras.src.backend.torch import numpy as torch_numpy

PATTERNS = {".*dense/kernel": (None, "model"), ".*dense_1/kernel": ("model", None)}


def model():
    return keras.Sequential([keras.Input((8,)), layers.Dense(6, name="dense"),
                             layers.Dense(4, name="dense_1")], name="sequential")


def layout_map(mesh):
    made = keras.distribution.LayoutMap(mesh)
    for pattern, layout in PATTERNS.items():
        made[pattern] = layout
    return made


def with_mesh(mesh):
    return model(), layout_map(mesh)


def patterns():
    return model(), PATTERNS


def own_mesh():
    return model(), layout_map(keras_tp.device_mesh({"model": 4}))


def compiled(mesh):
    made = model()
    made.compile(keras.optimizers.SGD(momentum=0.9), "mse")
    return made, layout_map(mesh)


def misspelt():
    return model(), {".*dense_7/kernel": (None, "model")}


def wrong():
    return model(), {".*dense/kernel": ("model",), ".*dense_1/kernel": ("modle", None)}


def two_wrong():
    return model(), {".*dense/kernel": ("model",), ".*dense_1/kernel": ("model", "model")}


def reads():
    made = model()
    assert made.weights[0].numpy().shape == (8, 6)
    return made, PATTERNS


def nothing():
    return model()


def many(mesh, more):
    return model(), PATTERNS


def a_list():
    return model(), [1]
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of a name that no other test has imported, in the current folder."""
    name = f"program_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return name


def run(*arguments: str) -> int | str | None:
    """The exit status, or what `sys.exit` was given to say."""
    try:
        main(["plan", *arguments])
    except SystemExit as end:
        return end.code
    return 0


def test_ways_to_give_a_model(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each user finds another of these natural; each is one plan, the table that print shows."""
    said = []
    for target in (f"{program}:with_mesh", f"{program}:patterns", f"{program}.py:with_mesh"):
        assert run(target, "--mesh", "model=4") == 0
        said.append(capsys.readouterr().out)
    assert run(f"{program}:own_mesh") == 0
    said.append(capsys.readouterr().out)
    assert len(set(said)) == 1
    assert "mesh model=4: 2 of 4 variables sharded" in said[0]
    assert "sequential/dense_1  row     kernel  (6, 4)" in said[0]
    assert "the fullest rank stores 544 B: parameters 136 B, gradients 136 B, two" in said[0]


def test_files_are_written_and_said(
    program: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that was asked for and is not there is found out a day later."""
    target = f"{program}:compiled"
    options = ["--mesh", "batch=2,model=2", "--html", "plan.html", "--json", "plan.json"]
    assert run(target, *options) == 0
    out = capsys.readouterr().out
    assert "wrote plan.html\nwrote plan.json\n" in out
    assert "layers communicate" in out
    page = (tmp_path / "plan.html").read_text()
    assert "optimizer keeps them" in page
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["mesh"]["sizes"] == [2, 2]
    assert plan["batch_axis"] == "batch"
    assert ", slots 184 B." in out  # one for each of the 46 weights of a rank
    assert run(target, "--mesh", "rows=2,model=2", "--batch-axis", "rows", "--json", "a.json") == 0
    assert json.loads((tmp_path / "a.json").read_text())["batch_axis"] == "rows"


def test_problems_of_a_layout_map_are_all_printed(
    program: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One error a run, in a traceback, is five runs."""
    said = str(run(f"{program}:two_wrong", "--mesh", "model=2"))
    assert said.startswith("keras-tp: 2 problems in this layout map (mesh: model=2)")
    said = str(run(f"{program}:wrong", "--mesh", "model=2"))
    assert "pattern '.*dense_1/kernel'" in said
    assert "modle" in said
    assert run(f"{program}:misspelt", "--mesh", "model=2") == 0
    out = capsys.readouterr().out
    assert out.count("matches no variable. Nearest") == 1, "said once, as a note"
    assert "matches no variable" in str(run(f"{program}:misspelt", "--mesh", "model=2", "--strict"))


WRONG = {
    "--mesh model": "'model' is not an axis and a size",
    "--mesh model=0": "'model=0' is not an axis and a size",
    "--mesh model=2,model=2": "names axis 'model' twice",
    "--mesh model=2 --html plan.txt": "'plan.txt' does not end in .html",
    "--mesh model=2 --json nowhere/plan.json": "is in a folder that is not there",
}


@pytest.mark.parametrize("options", WRONG)
def test_options_that_make_no_sense(
    program: str, options: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are found before a model is built, which takes a while."""
    assert run(f"{program}:patterns", *options.split()) == 2
    assert WRONG[options] in capsys.readouterr().err


def test_functions_that_give_no_plan(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An AttributeError from within says nothing of what the function should have returned."""
    wrong = {
        f"{program}:nothing": "returned Sequential, not (model, layout_map)",
        f"{program}:many": "wants 2 arguments (mesh, more)",
        f"{program}:a_list": "returned list for a layout map",
        f"{program}:absent": "has no function 'absent'",
        f"{program}:own_mesh": "asks for model=2, and",
        f"{program}": "is not module:function",
        "no_such_module:f": "there is no module 'no_such_module' here",
        "no_such.py:f": "there is no file 'no_such.py'",
    }
    for target, expected in wrong.items():
        assert run(target, "--mesh", "model=2") == 2
        assert expected in capsys.readouterr().err
    for name, expected in (("with_mesh", "wants the mesh"), ("patterns", "for no mesh")):
        assert run(f"{program}:{name}") == 2
        assert expected in capsys.readouterr().err


def test_what_needs_values_is_told_how(program: str) -> None:
    """ "Cannot copy out of meta tensor" is a riddle to who never asked for one."""
    with pytest.raises(NotImplementedError) as error:
        run(f"{program}:reads", "--mesh", "model=2")
    assert "--allocate builds it with all its weights" in error.value.__notes__[0]
    assert run(f"{program}:reads", "--mesh", "model=2", "--allocate") == 0


def test_a_model_that_no_machine_holds(tmp_path: Path) -> None:
    """70 billion weights, which Keras's way out of a symbolic call that fails would compute with.

    In a process of its own, whose memory is looked at; `python -m keras_tp` is the command.
    """
    code = (
        "import resource, runpy, sys; sys.argv = ['keras-tp', 'plan',"
        " 'keras_tp.examples.llama_shape:llama_70b', '--mesh', 'batch=8,model=8', '--html',"
        " 'a.html'];"
        "runpy.run_module('keras_tp', run_name='__main__');"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    command = [sys.executable, "-c", code]
    where = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(ROOT)}}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, **where)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    out = done.stdout.splitlines()
    assert out[0].startswith(
        "mesh batch=8, model=8: 562 of 723 variables sharded; the fullest rank"
        " stores 16.4 GiB of 131.4 GiB"
    )
    assert int(out[-1]) < 2e6, "kilobytes"
    assert (tmp_path / "a.html").stat().st_size < 1e5, "80 blocks are drawn once"


def test_plans_without_values_are_those_with() -> None:
    """A plan of a model that was not allocated must be that of the model that will be."""
    for build in (models.transformer, models.dense_stack):
        plans = []
        for scope in (without_values(), keras.device("cpu")):
            keras.utils.clear_session()
            with scope:
                model = build()
            devices = {local_tensor(v).device.type for v in model.variables}
            assert devices == ({"cpu"} if plans else {"meta"})
            layout = models.TRANSFORMER_LAYOUT if build is models.transformer else {}
            plans.append(keras_tp.plan(model, layout_map(layout, {"batch": 2, "model": 2})))
        assert plans[0] == plans[1]


def tied() -> Any:
    ids = keras.Input((5,), dtype="int32")
    table = layers.Embedding(7, 6, name="table")
    x = layers.Dense(6, name="middle")(table(ids))
    return keras.Model(ids, keras.ops.matmul(x, keras.ops.transpose(table.embeddings)))


def test_a_captured_view_is_found_without_values() -> None:
    """On the meta device no memory has an address, and Keras copies what it converts."""
    layout = layout_map({"table/embeddings": ("model", None)}, {"model": 2})
    with without_values():
        model = tied()
    with pytest.raises(keras_tp.LayoutError, match="operation 'matmul' of a functional model"):
        keras_tp.plan(model, layout)


def test_a_plan_of_another_scope_is_checked_as_it_is_carried_out() -> None:
    """Under Keras's own meta device the view is lost, and the plan was then obeyed in silence."""
    layout = layout_map({"table/embeddings": ("model", None)}, {"model": 2})
    with keras.device("meta"):
        plan = keras_tp.plan(tied(), layout)
    keras.utils.clear_session()
    with pytest.raises(keras_tp.LayoutError, match="operation 'matmul' of a functional model"):
        keras_tp.parallelize(tied(), plan=plan)


def test_the_scope_ends() -> None:
    """A device that stays after an error makes every later model one without values."""
    before = torch_numpy.repeat
    with without_values():
        assert keras.ops.repeat(keras.ops.ones((2, 3)), 2, axis=1).shape == (2, 6)
        assert keras.ops.repeat(keras.ops.ones((2, 3)), 2).shape == (12,)
        with pytest.raises(NotImplementedError, match="meta"):
            keras.ops.ones(2).tolist()
    with pytest.raises(ZeroDivisionError), without_values():
        raise ZeroDivisionError
    assert keras.ops.repeat(keras.Variable([1.0, 2.0]), 2).tolist() == [1, 1, 2, 2]
    assert torch_numpy.repeat is before


def test_a_symbolic_call_that_fails_is_an_error_and_allocates_nothing() -> None:
    """Keras falls back to computing with 83 rows of ones, and the process is killed."""

    class Reads(layers.Layer):
        def call(self, x: Any) -> Any:
            return x * float(keras.ops.sum(x))

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with without_values(), pytest.raises((RuntimeError, ValueError), match="meta"):
        Reads()(keras.Input((1 << 20,)))  # 83 such rows are 350 MB
    llama_of_little = llama(keras_tp.device_mesh({"model": 2}), 1, 64, 4, 2, 64, 128, 8)
    assert llama_of_little[0].built
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150e3, "kilobytes"
