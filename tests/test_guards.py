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
FILES = [p for p in PACKAGE.rglob("*.py") if p.parent.name != "examples"]
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text())
    for path in FILES
}

DECIDE = {
    "addresses",
    "advice",
    "alike",
    "automatic",
    "bases",
    "blocks",
    "candidates",
    "checks",
    "computations",
    "costs",
    "crossings",
    "dims",
    "distributions",
    "drawings",
    "dry_calls",
    "dry_collectives",
    "dry_drops",
    "dry_prefetch",
    "dry_replicas",
    "dry_rows",
    "dry_runs",
    "dry_sequences",
    "dry_steps",
    "dry_weights",
    "errors",
    "families",
    "flows",
    "garbage",
    "gates",
    "handovers",
    "heads",
    "layouts",
    "ledger",
    "likelihoods",
    "live_bytes",
    "looks",
    "manifests",
    "matrices",
    "outputs",
    "pages",
    "patterns",
    "places",
    "plans",
    "prices",
    "proposals",
    "price_tables",
    "rules",
    "optimizers",
    "pairings",
    "planner",
    "problems",
    "products",
    "reasons",
    "recollection",
    "regions",
    "rehearsal",
    "repeats",
    "rounding",
    "searches",
    "sequences",
    "shard_runs",
    "signs",
    "stretches",
    "tables",
    "token_runs",
    "tokens",
    "trails",
    "worth",
}
SEAM = {
    "seam.__init__",
    "seam.attention",
    "seam.callbacks",
    "seam.compilation",
    "seam.contexts",
    "seam.data",
    "seam.devices",
    "seam.distribution",
    "seam.dropout",
    "seam.fused",
    "seam.gradients",
    "seam.layers",
    "seam.likeness",
    "seam.masks",
    "seam.metrics",
    "seam.optimizers",
    "seam.positions",
    "seam.rehearsals",
    "seam.rows",
    "seam.saving",
    "seam.seeds",
    "seam.sharding",
    "seam.shortcuts",
    "seam.steps",
    "seam.stored",
    "seam.thrift",
    "seam.trials",
    "seam.updates",
    "seam.variables",
    "seam.weights",
}
ACT = {
    "agreement",
    "all_rows",
    "application",
    "archives",
    "batches",
    "buckets",
    "callbacks",
    "calls",
    "checkpoints",
    "collectives",
    "comparison",
    "contents",
    "copies",
    "creation",
    "data",
    "distribution_lib",
    "files",
    "job",
    "joins",
    "late_gradients",
    "leading",
    "loaders",
    "loops",
    "meetings",
    "mesh",
    "messages",
    "prefetch",
    "proof",
    "randomness",
    "region_calls",
    "replicas",
    "resumption",
    "row_collectives",
    "roll_calls",
    "rows",
    "savings",
    "sequence_calls",
    "shards",
    "sources",
    "state_dicts",
    "storage",
    "styles",
    "threads",
    "training",
    "verification",
    "watchdog",
    "whereabouts",
    "wrapper",
}
WHOLE = {"__init__", "__main__", "api", "arguments", "backend", "cli", "version"}


def imported(tree: ast.Module) -> set[str]:
    """Full names of the modules that are imported, wherever in the file."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def imports(module: str) -> set[str]:
    """Modules of the package that `module` imports."""
    names = {name.removeprefix("keras_tp.") for name in imported(MODULES[module])}
    return names & set(MODULES)


def test_every_module_has_its_half() -> None:
    """A module in neither half escapes the tests below."""
    assert set(MODULES) == DECIDE | SEAM | ACT | WHOLE


def test_decide_never_imports_act() -> None:
    """A planner that needs a process group cannot plan for a cluster one does not have."""
    assert not {(m, i) for m in DECIDE | SEAM for i in imports(m) & ACT}
    assert not {(m, i) for m in DECIDE for i in imports(m) & SEAM} - {
        ("advice", "seam.likeness"),
        ("alike", "seam.likeness"),
        ("alike", "seam.masks"),
        ("automatic", "seam.layers"),
        ("automatic", "seam.likeness"),
        ("bases", "seam.layers"),
        ("candidates", "seam.layers"),
        ("costs", "seam.layers"),
        ("costs", "seam.optimizers"),
        ("distributions", "seam.distribution"),
        ("distributions", "seam.layers"),
        ("dry_calls", "seam.contexts"),
        ("dry_calls", "seam.layers"),
        ("dry_calls", "seam.masks"),
        ("dry_drops", "seam.contexts"),
        ("dry_rows", "seam.contexts"),
        ("dry_rows", "seam.rows"),
        ("dry_sequences", "seam.contexts"),
        ("dry_sequences", "seam.layers"),
        ("dry_steps", "seam.layers"),
        ("dry_steps", "seam.metrics"),
        ("dry_steps", "seam.rehearsals"),
        ("dry_steps", "seam.rows"),
        ("dry_steps", "seam.steps"),
        ("dry_steps", "seam.trials"),
        ("dry_weights", "seam.contexts"),
        ("dry_weights", "seam.rehearsals"),
        ("handovers", "seam.layers"),
        ("handovers", "seam.likeness"),
        ("handovers", "seam.rehearsals"),
        ("heads", "seam.rehearsals"),
        ("outputs", "seam.masks"),
        ("outputs", "seam.weights"),
        ("planner", "seam.layers"),
        ("planner", "seam.likeness"),
        ("prices", "seam.layers"),
        ("prices", "seam.metrics"),
        ("prices", "seam.rehearsals"),
        ("prices", "seam.steps"),
        ("problems", "seam.layers"),
        ("recollection", "seam.layers"),
        ("recollection", "seam.likeness"),
        ("recollection", "seam.rehearsals"),
        ("regions", "seam.layers"),
        ("regions", "seam.rehearsals"),
        ("rehearsal", "seam.layers"),
        ("rehearsal", "seam.masks"),
        ("rehearsal", "seam.rehearsals"),
        ("repeats", "seam.likeness"),
        ("repeats", "seam.rehearsals"),
        ("searches", "seam.layers"),
        ("searches", "seam.likeness"),
        ("sequences", "seam.rehearsals"),
        ("stretches", "seam.layers"),
        ("stretches", "seam.rehearsals"),
        ("token_runs", "seam.layers"),
    }


def test_only_the_seam_touches_keras_internals() -> None:
    """Keras changes; one folder should have to follow. Private names of others count, too."""
    found = set()
    for module in set(MODULES) - SEAM:
        assert not [name for name in imported(MODULES[module]) if name.startswith("keras.src")]
        for node in ast.walk(MODULES[module]):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
                own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                if not own and not node.attr.startswith("__"):
                    found.add(ast.unparse(node))
    assert found == {
        "clip_grad._get_total_norm",
        "dist.distributed_c10d._get_default_store",
        "dist.distributed_c10d._world",
        "group._get_sequence_number_for_group",
        "os._exit",
        "sys._current_frames",
        "torch._assert_async",
        "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu",
        "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward",
        "torch.ops.mkldnn._linear_pointwise",
        "parameter._backward_hooks",
        "parameter._post_accumulate_grad_hooks",
    }


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
    table = (ROOT / "README.md").read_text().split("## What there is")[1].split("##")[0]
    missing = [n for n in keras_tp.__all__ if f"`{n}" not in table and n != "__version__"]
    assert not missing


# What others got wrong, each in a test that says so.
KNOWN_MISTAKES = (
    "nanotron #172",
    "DeepSpeed #5411",
    "TransformerEngine #715",
    "transformers #48569",
    "ColossalAI #6108",
    "torchtitan #4245",
    "torchtitan #1373",
    "Megatron-LM #1446",
    "pytorch #168058",
    "keras-hub #1613",
    "keras-hub #2806, #2810",
    "keras-hub #2827",
    "keras #19496",
    "silently wrong for attention",
    "and grouped attention",
    "vocabulary-sharded embeddings",
    "crashes for convolutions",
    "multiplies count metrics",
    "refuses arrays in `fit`",
    "unseeded replicas start different",
    "takes no notice of `jit_compile`",
    "takes 56",
)


def test_known_mistakes_have_their_tests() -> None:
    """One that no test names is one that nobody looked for."""
    files = [path for path in Path(__file__).parent.glob("*.py") if path.name != "test_guards.py"]
    text = " ".join(" ".join(path.read_text().split()) for path in files)
    assert [mistake for mistake in KNOWN_MISTAKES if mistake not in text] == []


def test_modules_are_short() -> None:
    """A module that has outgrown this has more than one noun."""
    lengths = {path: len(path.read_text().splitlines()) for path in FILES}
    assert {path: n for path, n in lengths.items() if n > 300} == {}
