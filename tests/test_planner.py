"""The plan of a model, and everything that can be wrong with a layout map."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from typing import Any

import keras
import models
import numpy as np
import pytest
import torch
import torch.distributed as dist
from keras import layers
from parity import layout_map
from torch.distributed.tensor import Replicate, Shard

import keras_tp


def plan_of(model: Any, layout: dict[Any, Any], size: int = 2, **options: Any) -> keras_tp.Plan:
    return keras_tp.plan(model, layout_map(layout, {"batch": 1, "model": size}), **options)


def problems_of(model: Any, layout: dict[Any, Any], **options: Any) -> tuple[str, ...]:
    with pytest.raises(keras_tp.LayoutError) as error:
        plan_of(model, layout, **options)
    return error.value.problems


def test_plan_lists_every_variable_and_layer() -> None:
    """A variable that no pattern claims is one too: seeds, norms, biases."""
    model = models.transformer()
    plan = plan_of(model, models.TRANSFORMER_LAYOUT)
    assert [v.path for v in plan.variables] == [v.path for v in model.variables]
    assert {layer.kind for layer in plan.layers} >= {"Functional", "InputLayer", "Add", "Dense"}
    by_path = {v.path: v for v in plan.variables}
    up = by_path["up_0/kernel"]
    assert (up.shape, up.dtype, up.layout) == ((16, 64), "float32", (None, "model"))
    assert up.placements == (Replicate(), Shard(1))
    assert up.local_shapes == ((16, 32), (16, 32))
    assert up.pattern == r"up_\d+/kernel"
    norm = by_path["norm/gamma"]
    assert (norm.layout, norm.pattern, norm.local_shapes) == ((None,), None, ((16,), (16,)))
    styles = {layer.path: layer.style for layer in plan.layers if layer.variables}
    assert styles["tokens"] == "vocabulary"
    assert styles["attention_0/query"] == styles["up_0"] == styles["head"] == "column"
    assert styles["attention_0/attention_output"] == styles["down_1"] == "row"
    assert styles["norm"] == "replicated"


def test_plan_is_a_value() -> None:
    """Plans made twice, or by two ranks, are compared; a plan changed on the way is no plan."""
    first = plan_of(models.transformer(), models.TRANSFORMER_LAYOUT)
    keras.utils.clear_session()
    second = plan_of(models.transformer(), models.TRANSFORMER_LAYOUT)
    keras.utils.clear_session()
    other = plan_of(models.transformer(), models.TRANSFORMER_LAYOUT, size=4)
    assert first == second
    assert first != other
    with pytest.raises(FrozenInstanceError):
        first.notes = ()  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        first.variables[0].path = ""  # type: ignore[misc]
    assert json.loads(json.dumps(first.to_dict())) == first.to_dict()
    assert first.to_dict()["variables"][0]["placements"] == ["R", "S(0)"]


def test_planning_is_pure_and_for_any_mesh() -> None:
    """A plan for a thousand ranks, where one process is all there is, that changes nothing."""
    model = models.dense_stack()
    before = {v.path: v.numpy().copy() for v in model.variables}
    plan = plan_of(model, {".*kernel": ("model", None)}, size=1024)
    assert not dist.is_initialized()
    assert plan.variables[0].shape == (128, 512)
    assert plan.variables[0].local_shape(127) == (1, 512)
    assert plan.variables[0].local_shape(128) == (0, 512)
    assert all((v.numpy() == before[v.path]).all() for v in model.variables)
    assert all(type(v) is keras.Variable for v in model.variables)


def test_the_storage_table_of_the_dense_stack() -> None:
    """The known shapes that parallelizing a Sequential of Dense layers gives."""
    plan = plan_of(models.dense_stack(), models.DENSE_LAYOUT)
    kernels = [v.local_shapes for v in plan.variables if v.path.endswith("kernel")]
    expected = [(128, 256), (512, 128), (256, 64), (128, 5)]
    assert kernels == [(shape, shape) for shape in expected]


def test_all_problems_at_once() -> None:
    """A user who fixes one problem a run needs five runs."""
    model = models.dense_stack()
    mesh = keras_tp.device_mesh({"batch": 1, "model": 2})
    other = keras.distribution.DeviceMesh((2,), ["tensor"], ["cpu:0", "cpu:1"])
    layout = keras.distribution.LayoutMap(mesh)
    layout["sequential/dense/kernel"] = (None, "model", None)
    layout["sequential/dense_1/kernel"] = ("model", "model")
    layout["sequential/dense_2/.*"] = (None, "model")
    layout[".*/dense_2/bias"] = ("model",)
    layout["sequential/dense_3/kernel"] = keras.distribution.TensorLayout((None, "tensor"), other)
    layout["("] = (None,)
    with pytest.raises(keras_tp.LayoutError) as error:
        keras_tp.plan(model, layout)
    text = str(error.value)
    assert text.startswith("6 problems in this layout map (mesh: batch=1, model=2)")
    assert "'sequential/dense/kernel' (128, 512)" in text
    assert "3 entries for 2 dims" in text
    assert "uses axis 'model' on 2 dims" in text
    assert "'sequential/dense_2/bias' is matched by 2 patterns" in text
    assert "names axis 'tensor'; the mesh has 'batch', 'model'" in text
    assert "of pattern 'sequential/dense_3/kernel' is for another mesh (tensor=2)" in text
    assert "not a valid regex" in text


def test_unused_patterns_warn_or_err() -> None:
    """keras-hub #2806: a renamed layer un-matched and stayed replicated, in silence."""
    model = models.dense_stack()
    layout = {".*dense_9/kernel": (None, "model")}
    with pytest.warns(keras_tp.LayoutWarning, match="matches no variable. Nearest: 'sequential/"):
        plan = plan_of(model, layout)
    assert "dense_9" in plan.notes[0]
    assert "note: pattern '.*dense_9/kernel' matches no variable" in str(plan)
    (problem,) = problems_of(model, layout, strict=True)
    assert "matches no variable. Nearest: 'sequential/dense_" in problem


def test_layouts_of_layer_outputs_are_checked_and_said() -> None:
    """A pattern of an activation is legal in Keras and no misspelling; a wrong one is an error, and
    one that changes nothing is not to pass for one that does."""
    model = models.dense_stack()
    with pytest.warns(keras_tp.LayoutWarning, match="so that it changes nothing"):
        plan = plan_of(model, {".*/dense/output": (None, "model")}, strict=True)
    (layer,) = [layer for layer in plan.layers if layer.output_layout]
    assert (layer.kind, layer.output_layout) == ("Dense", (None, "model"))
    assert any("/dense' a layout (None, 'model'): layers hand each" in n for n in plan.notes)
    uncut = plan_of(model, {".*/dense/output": ("batch", None)})
    assert not any(layer.output_layout for layer in uncut.layers)
    (twice,) = problems_of(model, {".*/dense/output": ("model", "model")})
    assert "/dense/output' a layout ('model', 'model') that uses axis" in twice
    two = {".*/dense/output": (None, "model"), ".*/dense/out.*": (None, "model")}
    (ambiguous,) = problems_of(model, two)
    assert "/dense/output' is matched by 2 patterns" in ambiguous


class Lazy(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.used = layers.Dense(2)
        self.unused = layers.Dense(2)

    def call(self, x: Any) -> Any:
        return self.used(x)


def test_unbuilt_models_are_told_how_to_build() -> None:
    """A model without variables matches no pattern and was parallelized as nothing at all."""
    (problem,) = problems_of(keras.Sequential([layers.Dense(2)]), {})
    assert "is not built" in problem
    assert "model.build((None, 128))" in problem
    lazy = Lazy()
    with pytest.warns(UserWarning, match="unbuilt state"):  # Keras's own, of the same matter
        lazy(np.ones((1, 3), "float32"))
    (problem,) = problems_of(lazy, {})
    assert "layer 'dense_2' (Dense) is not built" in problem


def test_wrong_arguments_are_layout_errors() -> None:
    """They ended in AttributeErrors that named our internals."""
    model = models.dense_stack()
    good = layout_map({}, {"model": 2})
    plan = keras_tp.plan(model, good)
    with pytest.raises(keras_tp.LayoutError, match=r"got a Plan for a layout map\. Give"):
        keras_tp.parallelize(model, plan)
    for wrong in (good, {}):
        with pytest.raises(keras_tp.LayoutError, match=r"expected a keras_tp\.Plan, got"):
            keras_tp.parallelize(model, plan=wrong)
    with pytest.raises(keras_tp.LayoutError, match=r"or a plan\."):
        keras_tp.parallelize(model, plan=plan, strict=True)
    for wrong in (None, torch.nn.Linear(2, 2)):
        with pytest.raises(keras_tp.LayoutError, match="expected a Keras model, got"):
            keras_tp.plan(wrong, good)
    with pytest.raises(keras_tp.LayoutError, match=r"expected a keras\.distribution\.LayoutMap"):
        keras_tp.plan(model, {".*": (None,)})
    with pytest.raises(keras_tp.LayoutError, match="has no device mesh"):
        keras_tp.plan(model, keras.distribution.LayoutMap(None))
    with pytest.raises(keras_tp.LayoutError, match="names a device twice"):
        keras_tp.plan(
            model,
            keras.distribution.LayoutMap(
                keras.distribution.DeviceMesh((2,), ["model"], ["cpu:0", "cpu:0"])
            ),
        )
    for shape in ({}, 2, {"model": 0}, {"model": 1.5}, {"model": True}):
        with pytest.raises(keras_tp.LayoutError):
            keras_tp.device_mesh(shape)
    assert keras_tp.device_mesh({"model": np.int64(2)}).shape == (2,)


def test_torch_modules_cannot_be_sharded() -> None:
    """A torch module reads its parameter itself: it would compute with the shard."""
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.TorchModuleWrapper(torch.nn.Linear(4, 4), output_shape=(None, 4)),
        ]
    )
    paths = [v.path for v in model.variables]
    (first, *_) = problems_of(model, {f"^{paths[0]}$": ("model", None)})
    assert "of layer 'torch_module_wrapper', a torch module" in first


def test_recurrent_weights_are_gathered_around_all_steps() -> None:
    """Gathered by the cell, a weight would travel once per time step."""
    model = keras.Sequential([keras.Input((5, 3)), layers.LSTM(4, name="lstm")])
    plan = plan_of(model, {".*kernel": (None, "model")})
    by_kind = {layer.kind: layer for layer in plan.layers}
    assert [plan.variables[i].path.split("/")[-1] for i in by_kind["LSTM"].gathers] == [
        "kernel",
        "recurrent_kernel",
    ]
    assert by_kind["LSTMCell"].gathers == ()
    assert "'sequential/lstm' gathers it once around them all" in by_kind["LSTMCell"].reason


def test_axes_of_one_rank_shard_nothing() -> None:
    """One process is a mesh of one rank, at no cost."""
    plan = plan_of(models.dense_stack(), models.DENSE_LAYOUT, size=1)
    assert not any(v.sharded for v in plan.variables)
    assert all(not layer.styles for layer in plan.layers)
    assert "one rank along model" in {layer.reason for layer in plan.layers}


def test_what_replicas_share_out_and_communicate_is_said() -> None:
    """Replicas that compute other rows cannot sum or join a layer's output along their axis; a
    weight that is cut along it is gathered, and its gradient summed and cut."""
    layout = {"sequential/dense/kernel": ("batch", "model")}
    plan = keras_tp.plan(models.dense_stack(), layout_map(layout, {"batch": 2, "model": 2}))
    assert any("each of its 2 replicas computes its own" in note for note in plan.notes)
    (dense,) = (layer for layer in plan.layers if layer.path == "sequential/dense")
    assert [str(c) for c in dense.forward if c.axis == "batch"] == ["all_gather kernel"]
    assert [str(c) for c in dense.backward if c.axis == "batch"] == ["reduce_scatter kernel"]
    assert dense.style == "gathered + column"


def test_what_a_plan_leaves_idle_or_reads_in_full_is_noted() -> None:
    """Ranks along an unused axis do the same work twice, and a regularizer has its own price."""
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(4, kernel_regularizer="l2", kernel_constraint="max_norm")]
    )
    layout = layout_map({".*kernel": ("model", None)}, {"data": 2, "model": 2})
    notes = keras_tp.plan(model, layout).notes
    assert notes[0] == "nothing is sharded along axis 'data': its 2 ranks all compute the same."
    assert [note.split(" of ")[0] for note in notes[1:]] == ["the regularizer", "the constraint"]


def test_bias_sharded_alone_says_why() -> None:
    """The reason was an empty string, printed as a reason."""
    plan = plan_of(models.dense_stack(), {".*dense/bias": ("model",)})
    (layer,) = [layer for layer in plan.layers if layer.styles]
    assert layer.reason == "gathered on use: its kernel is not sharded along that axis"


def test_a_reason_is_said_once() -> None:
    """A layer gathered along two axes gave its reason twice."""
    model = keras.Sequential([keras.Input((4, 4)), layers.Conv1D(4, 1)])
    layout = layout_map({".*kernel": (None, "data", "model")}, {"data": 2, "model": 2})
    (layer,) = [layer for layer in keras_tp.plan(model, layout).layers if layer.styles]
    assert layer.reason == "gathered on use: no rule computes Conv1D on shards"


def test_bytes_are_those_torch_stores() -> None:
    """torch has no uint32: Keras keeps seeds of that type in eight bytes."""
    mesh = plan_of(models.dense_stack(), models.DENSE_LAYOUT).mesh

    def stored(dtype: str) -> int:
        variable = keras_tp.VariablePlan("v", (3,), dtype, False, (None,), None, mesh)
        return keras_tp.Plan(mesh, (variable,), ()).full_bytes

    for dtype in ("bool", "int8", "uint16", "uint32", "int64", "bfloat16", "float64"):
        made = keras.Variable(np.zeros(3), dtype=dtype, trainable=False)
        assert stored(dtype) == made.value.untyped_storage().nbytes(), dtype


def test_the_table_shows_what_was_decided() -> None:
    """A plan nobody can read is not read."""
    plan = plan_of(models.transformer(), models.TRANSFORMER_LAYOUT, size=4)
    text = str(plan)
    header = text.splitlines()[0]
    for title in ("layer", "style", "full", "local", "pattern", "forward", "backward", "why not"):
        assert title in header
    up = next(line for line in text.splitlines() if line.startswith("up_0"))
    for cell in ("column", "(16, 64)", "(16, 16)", "all_reduce input grad"):
        assert cell in up
    assert f"mesh batch=1, model=4: 23 of {len(plan.variables)} variables sharded" in text


def test_a_view_that_a_graph_holds_is_an_error() -> None:
    """It would stay the old, full weight, and training would part from it without a word."""
    ids = keras.Input((5,), dtype="int32")
    table = layers.Embedding(7, 6, name="table")
    x = layers.Dense(6, name="middle")(table(ids))
    model = keras.Model(ids, keras.ops.matmul(x, keras.ops.transpose(table.embeddings)))
    (problem,) = problems_of(model, {"table/embeddings": ("model", None)})
    assert "operation 'matmul' of a functional model holds a view" in problem
    plan_of(model, {"middle/kernel": (None, "model")})
