"""Replicas share out the rows of a batch, and the numbers stay those of one process."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import keras
import layer_cases
import models
import numpy as np
import parity
import pytest
import torch
from counting import Collectives
from keras import layers
from precision import real_float64

import keras_tp
from keras_tp.layouts import row_counts

PICTURES = layer_cases.floats(5, 8, 8, 3)
UNIT_RANGE = {"value_range": (0, 1)}
# Layers without weights, random ones above all: how they are made.
WEIGHTLESS: dict[str, dict[str, Any]] = {
    "AlphaDropout": {"rate": 0.3},
    "AugMix": UNIT_RANGE,
    "AutoContrast": UNIT_RANGE,
    "CenterCrop": {"height": 4, "width": 4},
    "CutMix": {},
    "Dropout": {"rate": 0.5},
    "GaussianDropout": {"rate": 0.3},
    "GaussianNoise": {"stddev": 0.1},
    "GlobalAveragePooling2D": {},
    "MixUp": {},
    "RandAugment": UNIT_RANGE,
    "RandomBrightness": {"factor": 0.2, **UNIT_RANGE},
    "RandomColorDegeneration": {"factor": 0.5},
    "RandomColorJitter": {"brightness_factor": 0.2, "hue_factor": 0.1, **UNIT_RANGE},
    "RandomContrast": {"factor": 0.3},
    "RandomCrop": {"height": 4, "width": 4},
    "RandomElasticTransform": UNIT_RANGE,
    "RandomErasing": UNIT_RANGE,
    "RandomFlip": {},
    "RandomGaussianBlur": UNIT_RANGE,
    "RandomGrayscale": {"factor": 0.5},
    "RandomHue": {"factor": 0.3, **UNIT_RANGE},
    "RandomInvert": {"factor": 0.5, **UNIT_RANGE},
    "RandomPerspective": {},
    "RandomPosterization": {"factor": 3, **UNIT_RANGE},
    "RandomRotation": {"factor": 0.2},
    "RandomSaturation": {"factor": 0.3},
    "RandomSharpness": {"factor": 0.3, **UNIT_RANGE},
    "RandomShear": {"x_factor": 0.2, "y_factor": 0.2},
    "RandomTranslation": {"height_factor": 0.2, "width_factor": 0.2},
    "RandomZoom": {"height_factor": 0.2},
    "Resizing": {"height": 4, "width": 4},
    "Solarization": UNIT_RANGE,
    "SpatialDropout2D": {"rate": 0.5},
}


def replicated(model: Any, **axes: int) -> Any:
    """`model`, of which every rank holds all weights and computes its rows."""
    return keras_tp.parallelize(model, parity.layout_map({}, axes))


def weightless_outputs(name: str, seed: int | None) -> list[float]:
    """Largest differences from one process: two calls in training, one in inference."""
    kind, found = getattr(layers, name), []
    for share in (False, True):
        keras.utils.clear_session(free_memory=False)
        keras.utils.set_random_seed(3)
        arguments = dict(WEIGHTLESS[name])
        if seed is not None and "seed" in kind.__init__.__code__.co_varnames:
            arguments["seed"] = seed
        model = keras.Sequential([keras.Input(PICTURES.shape[1:]), kind(**arguments)])
        if share:
            replicated(model, batch=2)
        x = torch.tensor(PICTURES, dtype=torch.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras's augmentations use deprecated functions
            # (RandomBrightness writes into what it is given.)
            calls = [model(x.clone(), training=t) for t in (True, True, False)]
        found.append([np.asarray(outputs) for outputs in calls])
    return [float(np.abs(one - many).max()) for one, many in zip(*found, strict=True)]


@pytest.mark.parametrize("seed", [5, None])
@pytest.mark.parametrize("name", [n for n in WEIGHTLESS if hasattr(layers, n)])
def test_random_layers_draw_the_numbers_of_one_process(
    ranks: Any, name: str, seed: int | None
) -> None:
    """Replicas that draw the same mask for other rows train another model, with noise that
    repeats itself (pytorch #168058), and one that mixes rows must be given all of them."""
    for differences in ranks(2)(weightless_outputs, name, seed):
        assert differences == [0.0, 0.0, 0.0]


class Summed(layers.Layer):
    """A penalty that is no mean over rows."""

    def call(self, x: Any) -> Any:
        self.add_loss(keras.ops.sum(x**2))
        return x


class Centred(layers.Layer):
    """Mixes rows."""

    def __init__(self, all_rows: bool = False, **kwargs: Any):
        super().__init__(**kwargs)
        self.all_rows = all_rows

    def call(self, x: Any) -> Any:
        return x - keras.ops.mean(x, axis=0, keepdims=True)


class Contrasted(layers.Layer):
    """A penalty on pairs of rows."""

    all_rows = True

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.project = layers.Dense(3)

    def build(self, shape: Any) -> None:
        self.project.build(shape)

    def call(self, x: Any) -> Any:
        z = self.project(x)
        self.add_loss(keras.ops.mean(keras.ops.matmul(z, keras.ops.transpose(z)) ** 2))
        return x


class Remembering(layers.Layer):
    """Remembers its calls where no variable does."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.steps = 0
        self.random = np.random.default_rng(3)
        self.norm = torch.nn.BatchNorm1d(16, dtype=torch.float64)

    def call(self, x: Any, training: bool = False) -> Any:
        self.steps += 1
        return self.norm(x, training=training) * self.steps * float(self.random.random())


class Scaled(layers.Layer):
    """Holds a weight of torch's that Keras does not know."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.scale = torch.nn.Parameter(torch.arange(6.0))

    def call(self, x: Any) -> Any:
        return x * self.scale


class Metered(layers.Layer):
    """Keeps a metric of what it sees."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.size = keras.metrics.Mean()

    def call(self, x: Any) -> Any:
        self.size.update_state(keras.ops.mean(x**2))
        return x


class PerRow(layers.Layer):
    """A penalty for each row."""

    def call(self, x: Any) -> Any:
        self.add_loss(keras.ops.mean(x**2, axis=1))
        return x


class Torn(layers.Layer):
    """Draws from torch, behind Keras's back."""

    def call(self, x: Any, training: bool = False) -> Any:
        return x * torch.rand(x.shape) if training else x


class Noisy(layers.Layer):
    """Draws as many numbers as there are rows, or channels, on a replica; not by row."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.seeds = keras.random.SeedGenerator(3)

    def call(self, x: Any) -> Any:
        channels = keras.random.normal((x.shape[1],), dtype=x.dtype, seed=self.seeds)
        shared = keras.random.dropout(x, 0.5, noise_shape=(1, x.shape[1]), seed=self.seeds)
        return x * channels + shared


class Total(layers.Layer):
    """Gives no rows."""

    def call(self, x: Any) -> Any:
        return keras.ops.sum(x, axis=0)


def around(layer: Callable[[], Any] | None = None) -> Any:
    """A model with what is hard about rows in it, and `layer`."""
    parts = [layer()] if layer else []
    return keras.Sequential(
        [
            keras.Input((8,)),
            layers.Dense(16, "gelu", activity_regularizer="l2"),
            layers.BatchNormalization(),
            layers.Dropout(0.5),
            *parts,
            layers.Dense(4, kernel_regularizer="l1"),
        ]
    )


def whole_centred() -> Any:
    return around(lambda: Centred(all_rows=True))


def contrasted() -> Any:
    # With weights whose gradient is not zero without the penalty.
    parts = layers.Dense(6), Contrasted(), layers.Dense(4, activity_regularizer="l2")
    return keras.Sequential([keras.Input((8,)), *parts])


def remembering() -> Any:
    return around(Remembering)


def noisy() -> Any:
    return keras.Sequential([keras.Input((8,)), Noisy(), layers.Dense(4), layers.Dropout(0.2)])


def mixed(layer: str) -> tuple[list[str], float]:
    """What is said of a layer that mixes rows, and the largest difference from one process."""

    def build() -> Any:
        return around(lambda: globals()[layer](name="odd"))

    data = layer_cases.floats(7, 8), layer_cases.floats(7, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = parity.compare(build, {}, {"batch": 2}, data)
    said = [str(w.message) for w in caught if w.category is keras_tp.LayoutWarning]
    return said, report.worst()


@pytest.mark.parametrize("layer", ["Centred", "Torn", "Summed", "PerRow", "Metered"])
def test_what_mixes_rows_is_found_named_and_given_all(ranks: Any, layer: str) -> None:
    """A mean over the rows of one replica is another number, and nobody would see it; so is a
    penalty that is no mean over rows (or one for each row, which Keras sums), as the balance of
    experts in KerasHub's models; and what a layer's metric sees of half a batch."""
    for said, worst in ranks(2)(mixed, layer):
        assert any("in training, 'sequential/odd' mix the rows" in text for text in said)
        assert worst < 1e-10


class Joined(keras.Model):
    """Mixes rows in no layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = layers.Dense(4)

    def call(self, x: Any) -> Any:
        y = self.dense(x)
        return y - keras.ops.mean(y, axis=0)


def refusal() -> str:
    keras.utils.set_random_seed(0)
    model = Joined()
    model(torch.zeros(2, 8))
    replicated(model, batch=2)
    try:
        model(torch.arange(48.0).reshape(6, 8))
    except keras_tp.LayoutError as error:
        return str(error)
    return ""


def test_a_model_that_mixes_rows_itself_is_refused(ranks: Any) -> None:
    """No layer can be given all rows that would make it right."""
    for message in ranks(2)(refusal):
        assert "though no layer's do: look at how the model joins" in message
        assert "batch_axis=None" in message


def no_rows() -> str:
    model = keras.Sequential([keras.Input((8,)), Total()])
    replicated(model, batch=2)
    try:
        model(torch.ones(6, 8))
    except keras_tp.LayoutError as error:
        return str(error)
    return ""


def test_an_output_without_rows_is_refused(ranks: Any) -> None:
    """Two replicas' totals one after the other are not the total."""
    for message in ranks(2)(no_rows):
        assert "so that it is not one of rows" in message or "not computed alone" in message


def train(build: str, rows: int, axes: dict[str, int]) -> parity.Report:
    data = layer_cases.floats(rows, 8), layer_cases.floats(rows, 4)
    return parity.compare(globals()[build], {}, axes, data)


ROWS: list[tuple[dict[str, int], int]] = [
    *(({"batch": 2}, rows) for rows in (16, 5, 2, 1)),
    *(({"batch": 4}, rows) for rows in (5, 2)),
    *(({"batch": 2, "model": 2}, rows) for rows in (5, 1)),
]
BUILDS = "around", "whole_centred", "noisy", "contrasted", "remembering"


@pytest.mark.parametrize(
    ("build", "axes", "rows"),
    [
        (build, axes, rows)
        for axes, rows in ROWS
        for build in BUILDS
        if (build, rows) != ("remembering", 1)  # torch takes no statistics of one row
    ],
)
def test_training_on_any_number_of_rows(
    ranks: Any, build: str, rows: int, axes: dict[str, int]
) -> None:
    """A mean of means of 3 and 2 rows; a replica without a row; statistics of half a batch; the
    gradient of a penalty on weights counted once per replica; a layer given all rows; numbers
    for 8 channels taken for those of 8 rows, and one mask for all rows for that of one; a part of
    the gradient of a penalty that every replica has computed of all rows; calls that a proof made,
    counted."""
    for report in ranks(int(np.prod(list(axes.values()))))(train, build, rows, axes):
        assert report.worst() < 1e-10


def scaled() -> list[float]:
    found = []
    for share in (False, True):
        keras.utils.set_random_seed(3)
        layer = Scaled()
        model = keras.Sequential([keras.Input((8,)), layers.Dense(6), layer, layers.Dense(4)])
        if share:
            replicated(model, batch=2)
        outputs = model(torch.tensor(layer_cases.floats(5, 8), dtype=torch.float32), training=True)
        outputs.square().sum().backward()
        found.append([layer.scale.grad, model.layers[0].kernel.value.grad])
    return [parity.difference(one, many) for one, many in zip(*found, strict=True)]


def test_a_weight_that_keras_does_not_know(ranks: Any) -> None:
    """Read behind Keras's back, on a replica's rows, its gradient would be that of these."""
    for differences in ranks(2)(scaled):
        assert max(differences) < 1e-5


class Switching(keras.Model):
    """Mixes rows if it is told to, or trains; has no `training` argument."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = layers.Dense(4)
        self.centre = CentredToTrain()

    def call(self, x: Any, mode: str = "rows") -> Any:
        y = self.centre(self.dense(x))
        return y - keras.ops.mean(y, axis=0) if mode == "pairs" else y


class CentredToTrain(layers.Layer):
    def call(self, x: Any, training: bool = False) -> Any:
        return x - keras.ops.mean(x, axis=0) if training else x


class Gated(layers.Layer):
    """Mixes rows behind a gate that is closed at first."""

    def build(self, shape: Any) -> None:
        self.gate = self.add_weight(shape=(), initializer="zeros")

    def call(self, x: Any) -> Any:
        return x + self.gate * keras.ops.mean(x**2, axis=0)


def later(what: str) -> list[str]:
    """What two calls say, of which the first shows nothing, and whether what they give is right."""
    x = torch.tensor(layer_cases.floats(6, 8), dtype=torch.float32)
    said: list[list[str]] = []
    given: list[list[np.ndarray]] = []
    for share in (False, True):
        keras.utils.clear_session(free_memory=False)
        keras.utils.set_random_seed(3)
        model, calls = case_of_later(what, x)
        if share:
            replicated(model, batch=2)
        said.append([])
        given.append([])
        for call in calls:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", keras_tp.LayoutWarning)
                try:
                    given[-1].append(keras.ops.convert_to_numpy(call()))
                except keras_tp.LayoutError as error:
                    said[-1].append(f"error: {error}")
                    continue
            said[-1].append("".join(f"warning: {warning.message}" for warning in caught))
    assert said[0] == ["", ""]
    for one, many in zip(*given, strict=False):
        np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-6)
    return said[1]


def case_of_later(what: str, x: torch.Tensor) -> tuple[Any, list[Callable[[], Any]]]:
    model: Any
    if what == "zeros":
        model = around(lambda: Centred(name="odd"))
        return model, [lambda: model(torch.zeros(6, 8)), lambda: model(x)]
    if what == "gate":
        odd = Gated(name="odd")
        model = keras.Sequential([keras.Input((8,)), odd])
        return model, [lambda: model(x), lambda: (odd.gate.assign(1.0), model(x))[1]]
    if what == "lora":
        dense = layers.Dense(4, name="odd")
        model = keras.Sequential([keras.Input((8,)), dense])
        return model, [lambda: model(x), lambda: (dense.enable_lora(2), model(x))[1]]
    model = Switching()
    model(x)
    options: dict[str, Any] = {"mode": "pairs"} if what == "mode" else {"training": True}
    return model, [lambda: model(x), lambda: model(x, **options)]


@pytest.mark.parametrize(
    ("what", "kind", "says"),
    [
        ("zeros", "warning", "/odd' mix"),
        ("gate", "warning", "/odd' mix"),
        ("lora", "error", "odd/lora_kernel_a', "),
        ("mode", "error", "how the model joins"),
        ("training", "warning", "/centred_to_train' mix"),
    ],
)
def test_what_the_first_batch_does_not_show(ranks: Any, what: str, kind: str, says: str) -> None:
    """A batch of zeros to build it; a gate of zero; another way through the code; new weights."""
    for first, second in ranks(2)(later, what):
        assert first == ""
        assert second.startswith(kind)
        assert says in second


class Keeping(keras.Model):
    """Keeps what its loss is computed from."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = layers.Dense(3), layers.Dense(4)

    def call(self, x: Any, training: bool = False) -> Any:
        self.code = self.encoder(x)
        self.size = self.code.square().mean() if x.shape[1] == 7 else None
        return self.decoder(self.code)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) + (self.code**2).mean()


def keeping() -> Any:
    model = Keeping()
    model(np.zeros((2, 8)))
    return model


def checkpointed() -> Any:
    with keras.RematScope("full"):
        norm, dropout = layers.BatchNormalization(), layers.Dropout(0.5, seed=3)
        parts = layers.Dense(6, "tanh"), norm, dropout, layers.Dense(4)
        return keras.Sequential([keras.Input((8,)), *parts])


@pytest.mark.parametrize("build", ["keeping", "checkpointed"])
def test_what_is_read_after_the_call(ranks: Any, build: str) -> None:
    """A loss of one replica's code, its gradient counted twice; statistics of half a batch and
    other masks in what is computed again in backward."""
    for report in ranks(2)(train, build, 7, {"batch": 2}):
        assert report.worst() < 1e-10


def kept_mean() -> str:
    model = Keeping()
    model(np.zeros((2, 7)))
    replicated(model, batch=2)
    try:
        model(torch.ones(6, 7), training=True)
    except keras_tp.LayoutError as error:
        return str(error)
    return ""


def test_a_kept_mean_of_rows_is_refused(ranks: Any) -> None:
    """Of a replica's rows, it is another number."""
    for message in ranks(2)(kept_mean):
        assert "keeps `size`" in message or "not computed alone" in message


def twice() -> list[float]:
    found = []
    with real_float64():
        for share in (False, True):
            keras.utils.set_random_seed(3)
            encoder = keras.Sequential(
                [keras.Input((8,)), layers.Dense(6, activity_regularizer="l2")]
            )
            inputs = keras.Input((8,)), keras.Input((8,))
            model = keras.Model(inputs, layers.Subtract()([encoder(x) for x in inputs]))
            if share:
                replicated(encoder, batch=2)
            model.compile("sgd", "mse")
            x = [layer_cases.floats(5, 8), 2 * layer_cases.floats(5, 8)]
            model.train_on_batch(x, layer_cases.floats(5, 6))
            found.append([v.value.grad.numpy() for v in model.trainable_variables])
    return [parity.difference(one, many) for one, many in zip(*found, strict=True)]


def test_a_penalty_is_averaged_once(ranks: Any) -> None:
    """A part called twice by its whole: the first call's penalty shared out again by the second."""
    for differences in ranks(2)(twice):
        assert max(differences) < 1e-10


def fit_both(rows: int, batch_size: int, loss: str, optimizer: str) -> list[float]:
    """Fits, with weights of samples, metrics and validation, with and without replicas."""
    x, y = layer_cases.floats(rows, 8), layer_cases.integers(4, rows)
    weights = np.random.default_rng(0).random(rows)
    found: list[Any] = []
    with real_float64():
        for share in (False, True):
            model = parity.build_seeded(around)
            if share:
                replicated(model, batch=2)
            model.compile(
                optimizer,
                keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=loss),
                metrics=["accuracy"],
                weighted_metrics=["accuracy"],
            )
            keras.utils.set_random_seed(1)
            history = model.fit(
                *(x, y),
                batch_size=batch_size,
                epochs=2,
                sample_weight=weights,
                validation_data=(x[:5], y[:5]),
                verbose=0,
            ).history
            found.append(
                [
                    *history.values(),
                    model.predict(x, batch_size=batch_size, verbose=0),
                    model.evaluate(x, y, batch_size=batch_size, verbose=0),
                    *keras_tp.full_weights(model).values(),
                ]
            )
    return [parity.difference(one, many) for one, many in zip(*found, strict=True)]


@pytest.mark.parametrize("loss", ["sum_over_batch_size", "sum", "mean_with_sample_weight"])
@pytest.mark.parametrize(("rows", "batch_size"), [(16, 8), (11, 4)])
def test_fit_evaluate_predict(ranks: Any, loss: str, rows: int, batch_size: int) -> None:
    """Averaged gradients of unequal parts; a loss that is a sum divided by the replicas; metrics
    of one replica's rows; predictions in another order; shuffles that part ways."""
    for differences in ranks(2)(fit_both, rows, batch_size, loss, "adam"):
        assert max(differences) < 1e-10


def no_rows_shared() -> tuple[float, int]:
    with real_float64():
        one = parity.build_seeded(lambda: around(Centred))
        many = parity.build_seeded(lambda: around(Centred))
        keras_tp.parallelize(many, parity.layout_map({}, {"batch": 2}), batch_axis=None)
        x = torch.tensor(layer_cases.floats(6, 8))
        many(x)
        many(x)
        with Collectives() as counts:
            outputs = many(x)
        return parity.difference(one(x).detach(), outputs.detach()), sum(counts.values())


def test_without_a_batch_axis_every_rank_computes_all_rows(ranks: Any) -> None:
    """The remedy that errors name must be one."""
    assert ranks(2)(no_rows_shared) == [(0.0, 0)] * 2


def counted() -> tuple[dict[str, int], dict[str, int], int]:
    keras.utils.set_random_seed(0)
    model = replicated(models.dense_stack(), batch=2)
    x = torch.ones(4, *model.input_shape[1:])
    for _ in range(4):
        model(x)
    with Collectives() as forward:
        outputs = model(x)
    with Collectives() as backward:
        outputs.sum().backward()
    return dict(forward), dict(backward), len(model.trainable_variables)


def test_a_step_gathers_outputs_and_sums_gradients_in_buckets(ranks: Any) -> None:
    """One all-reduce per weight, or a gather of inputs that every replica has."""
    for forward, backward, variables in ranks(2)(counted):
        assert forward == {"all_gather": 1}
        assert backward == {"all_reduce": 1}
        assert variables > 1


def test_rows_are_shared_out_evenly() -> None:
    """By torch.chunk's rule, 5 rows on 4 replicas leave one without."""
    assert row_counts(5, 4) == (2, 1, 1, 1)


def test_the_plan_says_how_rows_are_computed() -> None:
    """What is slower, or whole on every rank, is said before it runs."""
    model = around(lambda: Centred(all_rows=True, name="centred"))
    plan = keras_tp.plan(
        model, parity.layout_map({".*dense/kernel": ("batch", None)}, {"batch": 2})
    )
    assert plan.batch_axis == "batch"
    rows = {layer.kind: layer.rows for layer in plan.layers}
    assert rows["BatchNormalization"] == "statistics"
    assert rows["Centred"] == "all"
    assert rows["Dense"] == "own"
    text = str(plan)
    assert "rows of the batch are shared out along axis 'batch'" in text
    assert "reduce_scatter kernel" in text
    assert "all_gather input" in text
    assert "all_reduce statistics" in text
    with pytest.raises(keras_tp.LayoutError, match="batch_axis='rows' is no axis of the mesh"):
        keras_tp.plan(model, parity.layout_map({}, {"batch": 2}), batch_axis="rows")


def mixed_inputs() -> str:
    inputs = keras.Input((3,)), keras.Input((3,))
    model = replicated(keras.Model(inputs, layers.Add()(inputs)), batch=2)
    try:
        model((torch.ones(4, 3), torch.ones(1, 3)))
    except keras_tp.LayoutError as error:
        return str(error)
    return ""


def test_inputs_of_different_lengths_are_refused(ranks: Any) -> None:
    """One row for all: each replica would get half of it, or none."""
    for message in ranks(2)(mixed_inputs):
        assert "(4, 3), (1, 3)" in message
        assert "batch_axis=None" in message


def masking() -> Any:
    ids = keras.Input((5,), dtype="int32")
    x = layers.Embedding(7, 6, mask_zero=True)(ids)
    return keras.Model(ids, layers.BatchNormalization()(x))


def masked() -> list[float]:
    found = []
    with real_float64():
        for share in (False, True):
            model = parity.build_seeded(masking)
            if share:
                replicated(model, batch=2)
            model.compile("sgd", "mse")
            tokens = np.array([[1, 2, 0, 0, 0], [3, 4, 5, 6, 0], [1, 0, 0, 0, 0]])
            targets = layer_cases.floats(3, 5, 6)
            losses = [model.train_on_batch(tokens, targets) for _ in range(3)]
            found.append([losses, *keras_tp.full_weights(model).values()])
    return [parity.difference(one, many) for one, many in zip(*found, strict=True)]


def test_masks_keep_to_their_rows(ranks: Any) -> None:
    """A loss over steps that are masked elsewhere; statistics of padding."""
    for differences in ranks(2)(masked):
        assert max(differences) < 1e-10


def centred() -> Any:
    # (Without dropout: the compiler draws other numbers than torch does.)
    return keras.Sequential(
        [keras.Input((8,)), layers.Dense(4), Centred(name="odd"), layers.Dense(2)]
    )


def compiled() -> tuple[list[str], list[float]]:
    data = layer_cases.floats(6, 8), layer_cases.floats(6, 2)
    losses = []
    with real_float64(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for share in (False, True):
            model = parity.build_seeded(centred)
            if share:
                replicated(model, batch=2)
            model.compile("sgd", "mse", jit_compile=share)
            losses.append([model.train_on_batch(*data) for _ in range(2)])
    said = [str(w.message) for w in caught if w.category is keras_tp.LayoutWarning]
    return said, [parity.difference(one, many) for one, many in zip(*losses, strict=True)]


def test_what_mixes_rows_is_found_before_it_is_compiled(ranks: Any) -> None:
    """The compiler sees no first batch: what is looked at there would not be."""
    for said, differences in ranks(2)(compiled, timeout=300.0):
        assert any("'sequential/odd' mix the rows" in text for text in said)
        assert max(differences) < 1e-10
