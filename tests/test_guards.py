"""Promises about the package itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import keras
import models
import pytest

import keras_tp

PACKAGE = Path(keras_tp.__file__).parent
ROOT = PACKAGE.parent
MODULES = {path.stem: ast.parse(path.read_text()) for path in PACKAGE.glob("*.py")}

DECIDE = {"errors", "layouts", "patterns", "plans", "rules", "optimizers", "planner", "tables"}
SEAM = {"variables"}
ACT = {"mesh", "collectives", "shards", "calls", "styles", "training", "wrapper", "data"}
WHOLE = {"__init__", "api", "backend", "version"}


def imports(module: str) -> set[str]:
    """Names of the package's modules that `module` imports, wherever in the file."""
    found = set()
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("keras_tp"):
            rest = node.module.removeprefix("keras_tp").strip(".")
            found |= {rest} if rest else {alias.name for alias in node.names}
    return found & set(MODULES)


def test_every_module_has_its_half() -> None:
    assert set(MODULES) == DECIDE | SEAM | ACT | WHOLE


def test_decide_never_imports_act() -> None:
    """A planner that needs a process group cannot plan for a cluster one does not have."""
    assert not {(m, i) for m in DECIDE | SEAM for i in imports(m) & ACT}


def test_the_seam_imports_no_rule_or_plan() -> None:
    """The seam serves both halves and so knows neither."""
    assert imports("variables") <= {"errors", "layouts", "optimizers"}


@pytest.mark.parametrize(
    "name",
    [
        "_value",
        "_torch_params",
        "_trainable_variables",
        "_layers",
        "_flatten_layers",
        "_maybe_autocast",
    ],
)
def test_only_the_seam_touches_keras_internals(name: str) -> None:
    """Keras changes; one file should have to follow."""
    for module, tree in MODULES.items():
        if module in SEAM:
            continue
        assert not [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == name]
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("keras.src"), module


def run(code: str, **environment: str) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command,
        env={"PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_starts_nothing_and_chooses_torch() -> None:
    """An import that joined a process group would hang a laptop."""
    code = (
        "import keras_tp, keras, torch.distributed as d;"
        "from keras.src.optimizers.base_optimizer import BaseOptimizer as B;"
        "print(keras.config.backend(), d.is_initialized(), hasattr(B.build, '_keras_tp'))"
    )
    assert run(code).split() == ["torch", "False", "False"]


def test_another_backend_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """On JAX every later error would be a riddle."""
    monkeypatch.setattr(keras.config, "backend", lambda: "jax")
    model = models.dense_stack()
    for function in (keras_tp.plan, keras_tp.parallelize):
        with pytest.raises(keras_tp.LayoutError, match="backend is 'jax'; keras_tp needs 'torch'"):
            function(model, None)


def test_public_names_are_in_the_readme() -> None:
    """A name nobody can find is not public."""
    readme = (ROOT / "README.md").read_text()
    missing = [n for n in keras_tp.__all__ if n not in readme and n != "__version__"]
    assert not missing


def test_modules_are_short() -> None:
    """A module that outgrows a screenful or ten has more than one noun."""
    lengths = {m: len((PACKAGE / f"{m}.py").read_text().splitlines()) for m in MODULES}
    assert {m: n for m, n in lengths.items() if n > 360} == {}
