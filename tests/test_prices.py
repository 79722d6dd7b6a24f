"""What a plan says that a training step sends, against what ranks send in one."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import keras
import models
import numpy as np
import parity
import pytest
import torch
from counting import Traffic
from keras import layers, ops, optimizers, regularizers
from parity import layout_map

import keras_tp
from keras_tp.cli import main
from keras_tp.examples.train_transformer import layout_map as demo_layout
from keras_tp.examples.train_transformer import transformer as demo
from keras_tp.seam.contexts import stepping
from keras_tp.seam.variables import local_tensor
from keras_tp.trails import Step

Found = dict[str, dict[tuple[str, int], tuple[int, int]]]


def by_hand(model: Any, x: Any, y: Any) -> Found:
    """A step as Keras's `train_step` makes it, and what it sends in each phase."""
    found: Found = {}
    with Traffic() as found["forward"], stepping():
        outputs = model(x, training=True)
        model.zero_grad()
        loss = model._compute_loss(x=x, y=y, y_pred=outputs, sample_weight=None, training=True)
        loss = model.optimizer.scale_loss(loss)
    with Traffic() as found["backward"]:
        loss.backward()
    weights = model.trainable_weights[:]
    gradients = [v.value.grad for v in weights]
    with Traffic() as found["optimizer"], torch.no_grad():
        model.optimizer.apply(gradients, weights)
    return found


def planned(cost: Any) -> Found:
    found: Found = {phase: {} for phase in ("forward", "backward", "optimizer")}
    for traffic in cost.traffic:
        key = traffic.kind, traffic.ranks
        count, size = found[traffic.phase].get(key, (0, 0))
        found[traffic.phase][key] = count + traffic.count, size + traffic.bytes
    return found


class TwoHeads(layers.Layer):
    """Calls one dense layer twice, and has a weight that is read by no layer with a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = layers.Dense(8, name="twice")

    def build(self, shape: Any) -> None:
        self.dense.build(shape)
        self.scale = self.add_weight(shape=(8,), name="scale")

    def call(self, x: Any) -> Any:
        return self.dense(self.dense(x)) * self.scale


class Balanced(layers.Layer):
    """Mixes rows, says so, and adds a loss."""

    all_rows = True

    def call(self, x: Any) -> Any:
        self.add_loss(ops.mean(x))
        return x - ops.mean(x, axis=0)


def around() -> Any:
    """What is done around layers: statistics, penalties, a frozen layer, uneven cuts, a repeat."""
    return keras.Sequential(
        [
            keras.Input((8,)),
            layers.Dense(8, "relu", activity_regularizer=regularizers.L2(0.1), name="up"),
            layers.BatchNormalization(),
            layers.Dense(7, name="odd", kernel_regularizer=regularizers.L2(0.1)),
            layers.Dense(8, name="frozen", trainable=False),
            TwoHeads(),
            Balanced(),
            layers.Dropout(0.3),
            layers.Reshape((4, 2)),
            layers.Conv1D(6, 2, name="conv"),
            layers.RNN(layers.LSTMCell(4), unroll=True, name="lstm"),
            layers.Dense(3, name="head"),
        ]
    )


AROUND = {
    ".*up/kernel": (None, "model"),
    ".*up/bias": ("model",),
    ".*odd/kernel": (None, "model"),
    ".*frozen/kernel": ("model", None),
    ".*twice/kernel": (None, "model"),
    ".*scale": ("model",),
    ".*conv/kernel": (None, None, "model"),
    ".*lstm.*recurrent_kernel": (None, "model"),
    ".*head/kernel": ("model", None),
}

# Along "batch", where replicas are; what has other dims than it is cut into stays whole.
FULLY_SHARDED = {".*kernel": ("batch", None)}
BOTH = {".*dense/kernel": ("batch", "model"), ".*dense_[12]/kernel": ("model", "batch")}


def demo_model() -> Any:
    return demo(8, 16, 2, 2, dropout=0.1)


def text() -> tuple[Any, Any]:
    tokens = np.arange(4 * 9).reshape(4, 9) % 251
    return tokens[:, :-1].astype("int32"), tokens[:, 1:].astype("int32")


def numbers() -> tuple[Any, Any]:
    random = np.random.default_rng(0)
    return random.standard_normal((5, 8), "float32"), random.standard_normal((5, 3), "float32")


def dense_numbers() -> tuple[Any, Any]:
    x, y = models.dense_data()
    return x.astype("float32"), y.astype("float32")


DEMO = {pattern: entry.axes for pattern, entry in demo_layout(1).items()}
SEQUENCE = "demo, sequence"  # of which norms, dropout and residuals are cut along tokens
CHOSEN: dict[str, tuple[Callable[[], Any], dict[str, Any], Callable[[], Any], str]] = {
    "mlp": (models.dense_stack, models.DENSE_LAYOUT, dense_numbers, "mse"),
    "mlp, rows": (models.dense_stack, {".*kernel": ("model", None)}, dense_numbers, "mse"),
    "mlp, over replicas": (models.dense_stack, FULLY_SHARDED, dense_numbers, "mse"),
    "mlp, over both": (models.dense_stack, BOTH, dense_numbers, "mse"),
    "transformer": (models.transformer, models.TRANSFORMER_LAYOUT, models.transformer_data, "sce"),
    "demo": (demo_model, DEMO, text, "sce"),
    SEQUENCE: (demo_model, DEMO, text, "sce"),
    "around": (around, AROUND, numbers, "mse"),
}
OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "adam": lambda: optimizers.Adam(),
    "clipped": lambda: optimizers.Adam(global_clipnorm=1.0),
    "each clipped": lambda: optimizers.SGD(clipnorm=1.0),
    "whole": lambda: optimizers.Lamb(),
    "factored": lambda: optimizers.Adafactor(),
    "scaled": lambda: optimizers.LossScaleOptimizer(optimizers.Adam(clipnorm=1.0)),
}


def compiled(name: str, optimizer: str) -> tuple[Any, Any, Any]:
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    make, _, data, loss = CHOSEN[name]
    model = make()
    if loss == "sce":
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(OPTIMIZERS[optimizer](), loss)
    return model, *data()


def both(mesh: dict[str, int], chosen: list[tuple[str, str, str]]) -> list[tuple[Found, Found]]:
    """Of each model what was planned to be sent, and what was, by this rank."""
    found = []
    for name, optimizer, policy in chosen:
        keras.config.set_dtype_policy(policy)
        try:
            model, x, y = compiled(name, optimizer)
            made = layout_map(CHOSEN[name][1], mesh)
            plan = parity.planned(model, made, sequence_parallel=name == SEQUENCE)
            assert (plan.sequence is not None) == (name == SEQUENCE)
            rank = torch.distributed.get_rank()
            price = planned(plan.cost(model, x, targets=y, rank=rank))
            keras_tp.parallelize(model, plan=plan, check_batches=False)
            x, y = torch.as_tensor(x), torch.as_tensor(y)
            for _ in range(2):  # rows are compared in the first two
                by_hand(model, x, y)
            found.append((price, by_hand(model, x, y)))
        finally:
            keras.config.set_dtype_policy("float32")
    return found


F32, BF16 = "float32", "mixed_bfloat16"
ON_TWO = {
    "model": [
        ("mlp", "adam", F32),
        ("mlp", "clipped", BF16),
        ("mlp, rows", "whole", F32),
        ("transformer", "clipped", F32),
        ("demo", "adam", F32),
        ("demo", "scaled", BF16),
        (SEQUENCE, "adam", F32),
        (SEQUENCE, "clipped", BF16),
        ("mlp, rows", "each clipped", BF16),
        ("around", "factored", F32),
    ],
    "batch": [
        ("mlp", "clipped", F32),
        ("mlp, over replicas", "adam", F32),
        ("mlp, over replicas", "whole", BF16),
        ("transformer", "adam", F32),
        ("demo", "clipped", BF16),
        ("around", "adam", F32),
    ],
}


@pytest.mark.parametrize("axis", ON_TWO)
@pytest.mark.filterwarnings("ignore::keras_tp.LayoutWarning")
def test_two_ranks_send_what_is_planned(ranks: Any, axis: str) -> None:
    """A gradient nobody wants is counted; a gather without its zeros; a layer that is called
    twice, once; the flags behind gradients in a bucket are not."""
    mesh = {"batch": 1, "model": 1} | {axis: 2}
    for found in ranks(2)(both, mesh, ON_TWO[axis]):
        for chosen, (price, sent) in zip(ON_TWO[axis], found, strict=True):
            assert price == sent, chosen
            assert price["forward"], chosen


ON_FOUR = [
    ("mlp, over both", "whole", F32),
    ("transformer", "clipped", F32),
    (SEQUENCE, "adam", F32),
    ("around", "adam", F32),
]


@pytest.mark.filterwarnings("ignore::keras_tp.LayoutWarning")
def test_four_ranks_send_what_is_planned(ranks: Any) -> None:
    """Rows of the whole batch are counted in each replica; an axis takes part in the other's."""
    for found in ranks(4)(both, {"batch": 2, "model": 2}, ON_FOUR):
        for chosen, (price, sent) in zip(ON_FOUR, found, strict=True):
            assert price == sent, chosen


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
# Long enough for activations to be most of it, and scores of attention much of those.
SIZES = {"tokens": 96, "width": 32, "heads": 4, "blocks": 2, "rows": 16, "steps": 5}


def compared(
    dropout: float, mesh: dict[str, int], cut: bool, sequence: bool
) -> list[tuple[str, int, int]]:
    if str(BENCHMARKS) not in sys.path:
        sys.path.append(str(BENCHMARKS))
    import costs

    options = argparse.Namespace(**SIZES, dropout=dropout)
    rows: list[tuple[str, int, int]] = costs.measure(options, mesh, cut, sequence)
    return rows


@pytest.mark.parametrize(
    ("mesh", "dropout", "cut", "sequence"),
    [
        ({"batch": 1, "model": 2}, 0.0, False, False),
        ({"batch": 1, "model": 2}, 0.1, False, False),
        ({"batch": 1, "model": 2}, 0.1, False, True),
        ({"batch": 2, "model": 1}, 0.1, True, False),
    ],
)
def test_memory_is_what_ranks_hold(
    ranks: Any, mesh: dict[str, int], dropout: float, cut: bool, sequence: bool
) -> None:
    """Activations of the whole batch, or whole ones where layers hand on shards; scores of
    attention that no kernel keeps; gathered weights forgotten, which are there until backward."""
    for rows in ranks(2)(compared, dropout, mesh, cut, sequence):
        found = {name: (planned, measured) for name, planned, measured in rows}
        for name, (planned, measured) in found.items():
            allowed = 0 if "," in name else 0.05
            assert abs(measured / planned - 1) <= allowed, (name, planned, measured)
        assert found["activations"][0] > 2 * found["parameters"][0]


class Wide(layers.Layer):
    """Needs much memory for a moment, and keeps nothing of it."""

    def call(self, x: Any) -> Any:
        return ops.mean(ops.expand_dims(x, -1) * ops.ones((16,)), -1)


def frozen() -> Any:
    """Layers of which nothing is kept for backward, so that the fullest moment is within `Wide`."""
    first, second = (layers.Dense(256, use_bias=False, trainable=False, name=n) for n in "ab")
    model = keras.Sequential([keras.Input((256,)), first, Wide(), second, layers.Dense(1)])
    model.compile("sgd", "mse")
    return model


def held_ahead(rows: int) -> tuple[int, int, int]:
    """Bytes at most that are planned, that would be if nothing were begun ahead, and that are."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.append(str(BENCHMARKS))
    from live import Live

    model = frozen()
    plan = parity.planned(model, layout_map({".*[ab]/kernel": ("batch", None)}, {"batch": 2}))
    x, y = np.zeros((rows, 256), "float32"), np.zeros((rows, 1), "float32")
    rank = torch.distributed.get_rank()
    cost = plan.cost(model, x, targets=y, rank=rank)
    with mock.patch.object(Step, "ahead", return_value=()):
        without = plan.cost(model, x, targets=y, rank=rank)
    keras_tp.parallelize(model, plan=plan, check_batches=False)
    for _ in range(4):  # in which rows are compared
        model.train_on_batch(x, y)
    peaks = []
    for _ in range(3):
        known = [local_tensor(v) for v in model.variables]
        gradients = [tensor.grad for tensor in known if tensor.grad is not None]
        time.sleep(0.1)  # gloo's threads let go of what they have sent a moment later
        with Live(parameters=known, gradients=gradients) as live:
            model.train_on_batch(x, y)
        peaks.append(live.peaks["step"])
    return cost.peak, without.peak, min(peaks)


def test_what_is_on_its_way_is_planned(ranks: Any) -> None:
    """The weight that is gathered ahead is forgotten, and a job that was to fit does not."""
    kernel = 4 * 256 * 256
    for planned_peak, without, found in ranks(2)(held_ahead, 256):
        assert planned_peak - without == kernel
        assert abs(found / planned_peak - 1) < 0.05, (planned_peak, found)


def dense_price(size: int = 2, **options: Any) -> Any:
    model = models.dense_stack()
    model.compile("adam", "mse")
    plan = keras_tp.plan(model, layout_map(models.DENSE_LAYOUT, {"batch": 1, "model": size}))
    return plan.cost(model, (6, 128), **options)


def test_a_price_is_what_is_written_down_by_hand() -> None:
    """Bytes of a shard for those of the whole, and a ring that sends twice what it has to."""
    cost = dense_price(4, targets=(6, 10))
    assert [(t.kind, t.layer, t.of, t.phase, t.count, t.bytes) for t in cost.traffic] == [
        *(
            ("all_gather", f"sequential/{name}", "output", "forward", 1, 6 * 4 * units)
            for name, units in zip(
                ("dense", "dense_1", "dense_2", "dense_3"), (512, 256, 128, 12), strict=True
            )
        ),
        *(
            ("all_reduce", f"sequential/{name}", "input gradient", "backward", 1, 6 * 4 * units)
            for name, units in (("dense_3", 128), ("dense_2", 256), ("dense_1", 512))
        ),
    ]
    forward, backward = 6 * 4 * (512 + 256 + 128 + 12), 6 * 4 * (128 + 256 + 512)
    assert cost.sent == 3 / 4 * forward + 2 * 3 / 4 * backward
    # The first layer has no gradient of its input; products are cut in four.
    products = 128 * 512 + 512 * 256 + 256 * 128 + 128 * 12
    assert cost.flops == 2 * 6 * (3 * products - 128 * 512) // 4
    assert cost.collectives("forward") == {"all_gather": 4}


def test_the_share_of_a_step() -> None:
    """A share of the computation alone is more than 1 where a step communicates mostly."""
    cost = dense_price()
    assert cost.seconds(cost.sent) == 1
    assert cost.share(cost.sent, step_seconds=4) == 0.25
    assert cost.share(cost.sent, flops_per_second=cost.flops) == 0.5
    assert cost.share(cost.sent / 3, flops_per_second=cost.flops) == 0.75
    assert dense_price(1).share(1e9, step_seconds=1) == 0
    with pytest.raises(ValueError, match="either step_seconds or flops_per_second"):
        cost.share(1e9)


def test_the_model_is_as_before() -> None:
    """A loss that was built on the meta device, a call that stays a stand-in."""
    model, x, y = compiled("around", "adam")
    plan = keras_tp.plan(model, layout_map(AROUND, {"batch": 2, "model": 2}), strict=False)
    before = [np.asarray(v) for v in model.variables]
    attributes = {id(layer): dict(vars(layer)) for layer in model._flatten_layers()}
    plan.cost(model, x, targets=y)
    assert {id(layer): dict(vars(layer)) for layer in model._flatten_layers()} == attributes
    for variable, value in zip(model.variables, before, strict=True):
        assert (np.asarray(variable) == value).all()
    assert not model._compile_loss.built
    assert gc.isenabled()
    model.fit(x, y, verbose=0)
    again = keras_tp.plan(model, layout_map(AROUND, {"batch": 2, "model": 2}))
    assert again.cost(model, x, targets=y) == plan.cost(model, x, targets=y)


def test_what_is_not_counted_is_said() -> None:
    """A number that looks like all of it."""
    model = keras.Sequential([keras.Input((8,)), layers.Dense(4, kernel_constraint="non_neg")])
    plan = keras_tp.plan(model, layout_map({".*kernel": (None, "model")}, {"batch": 2, "model": 2}))
    notes = " ".join(plan.cost(model, (1, 8)).notes)
    for said in ("give targets", "no optimizer", "fewer rows than replicas", "the constraint of"):
        assert said in notes, said
    assert "give targets" in str(plan.cost(model, (4, 8)))


@pytest.mark.parametrize(
    ("batch", "options", "said"),
    [
        ((4, 128), {"rank": 7}, "has no rank 7"),
        ([(4, 128), (4, 2)], {}, "1 inputs, and 2 shapes"),
        ("4,128", {}, "neither a shape nor an array"),
    ],
)
def test_what_cannot_be_priced_is_refused(batch: Any, options: Any, said: str) -> None:
    """A riddle from deep within Keras."""
    model = models.dense_stack()
    plan = keras_tp.plan(model, layout_map(models.DENSE_LAYOUT, {"batch": 1, "model": 2}))
    with pytest.raises(ValueError, match=said):
        plan.cost(model, batch, **options)
    with pytest.raises(ValueError, match="compiled with none"):
        plan.cost(model, (4, 128), targets=(4, 10))
    with pytest.raises(keras_tp.LayoutError, match="made for another model"):
        plan.cost(models.transformer(), (4, 12))


def test_the_command_prints_it(capsys: Any, monkeypatch: Any, tmp_path: Path) -> None:
    """Bandwidth in bits, a share of the computation alone, a shape that is taken for two inputs."""
    program = (
        "import models\n\n\ndef dense():\n    return models.dense_stack(), models.DENSE_LAYOUT\n"
        "def compiled():\n    model, layout = dense()\n"
        "    model.compile('sgd', 'mse', metrics=['mae'])\n    return model, layout\n"
    )
    (tmp_path / "priced.py").write_text(program)
    command = ["plan", f"{tmp_path / 'priced.py'}:dense", "--mesh", "model=2"]
    main([*command, "--batch", "6,128", "--bandwidth", "0.000001"])
    shown = capsys.readouterr().out
    assert "batch of (6, 128), rank 0 of 2" in shown
    assert "notes" not in shown
    seconds = dense_price().sent / 1000
    assert f"at 1e-06 GB/s along every axis it communicates for {seconds:.3g} s, lat" in shown
    rate = dense_price().flops / seconds / 1e3
    assert f"half of a step of ranks that compute {rate:.4g} KFLOP/s" in shown
    assert "compile the model with them, give targets (in the shell --targets)" in shown
    main([*command, "--batch", "6,128", "--bandwidth", "0.000001", "--compute", f"{3e-9 * rate}"])
    assert "communication is 75 % of a step" in capsys.readouterr().out
    for wrong, said in [
        (["--batch", "6x128"], "is not a shape"),
        (["--batch", "6,128", "--bandwidth", "fast"], "is not a number of GB/s"),
        (["--bandwidth", "5"], "give --batch"),
        (["--batch", "6,128", "--compute", "5"], "give --bandwidth"),
    ]:
        with pytest.raises(SystemExit):
            main([*command, *wrong])
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit, match="where the model takes"):
        main([*command, "--batch", "6,127"])
    targets = ["--batch", "6,128", "--targets", "6,10"]
    with pytest.raises(SystemExit, match="the model is compiled with none"):
        main([*command, *targets])
    command[1] = command[1].replace("dense", "compiled")
    capsys.readouterr()
    main([*command, *targets])
    shown = capsys.readouterr().out
    assert "optimizer slots 0 B" in shown
    assert "the loss and metrics are not counted" not in shown
    with pytest.raises(RuntimeError) as raised:
        main([*command, *targets[:3], "6,9"])
    assert "on --batch and --targets of these shapes" in raised.value.__notes__[-1]
