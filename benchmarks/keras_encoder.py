"""The encoder in Keras, and its steps: plain, by keras_tp, or under Keras's own ModelParallel.

What is timed is `model.train_function`, the step that `fit` runs, on a batch that is in place
already and without callbacks: `fit` adds reading data and telling callbacks to it. It is the same
for all, but that on JAX it is handed the state, and waited for in the end.
"""

from __future__ import annotations

from typing import Any

import keras
from encoder import ADAM_EPSILON, CLASSES, NORM_EPSILON, Size
from keras import layers


def encoder(size: Size) -> Any:
    inputs = x = keras.Input((size.tokens, size.width))
    for i in range(size.blocks):
        h = layers.LayerNormalization(epsilon=NORM_EPSILON, name=f"attention_norm_{i}")(x)
        h = layers.MultiHeadAttention(size.heads, size.per_head, name=f"attention_{i}")(h, h)
        x = layers.Add(name=f"attention_add_{i}")([x, h])
        h = layers.LayerNormalization(epsilon=NORM_EPSILON, name=f"mlp_norm_{i}")(x)
        h = layers.Dense(size.hidden, activation="gelu", name=f"up_{i}")(h)
        h = layers.Dense(size.width, name=f"down_{i}")(h)
        x = layers.Add(name=f"mlp_add_{i}")([x, h])
    x = layers.LayerNormalization(epsilon=NORM_EPSILON, name="norm")(x)
    model = keras.Model(inputs, layers.Dense(CLASSES, name="head")(x))
    variables = {v.path: v for v in model.variables}
    for name, value in size.weights():
        variables.pop(name).assign(value)
    assert not variables, f"without a value: {list(variables)}"
    return model


def layout_map(mesh: Any, size: Size) -> Any:
    """Megatron's layout."""
    layout = keras.distribution.LayoutMap(mesh)
    layout[r".*(query|key|value)/kernel"] = (None, "model", None)
    layout[r".*(query|key|value)/bias"] = ("model", None)
    layout[r".*attention_output/kernel"] = ("model", None, None)
    layout[r"up_\d+/kernel"] = (None, "model")
    layout[r"up_\d+/bias"] = ("model",)
    layout[r"down_\d+/kernel"] = ("model", None)
    if size.head_layout == "columns":
        layout["head/kernel"] = (None, "model")
        layout["head/bias"] = ("model",)
    return layout


class KerasTraining:
    """Steps of `train_function`, on torch.

    Args:
        model: compiled here, and parallelized by then or by `prepare`.
        size: of the batch.
        jit_compile: for `compile`.
        prepare: what else to do with the compiled model.
    """

    def __init__(
        self, model: Any, size: Size, jit_compile: bool = False, prepare: Any = lambda model: None
    ):
        self.model = model
        model.compile(
            keras.optimizers.Adam(1e-3, epsilon=ADAM_EPSILON),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            jit_compile=jit_compile,
        )
        prepare(model)
        self.arrays = size.batch()
        self.batch = self.in_place(*map(keras.ops.convert_to_tensor, self.arrays))

    def in_place(self, x: Any, y: Any) -> Any:
        return x, y

    def loss(self) -> float:
        """Of one more step."""
        return float(self.model.train_on_batch(*self.arrays))

    def set_rate(self, rate: float) -> None:
        self.model.optimizer.learning_rate = rate

    def run(self, steps: int) -> None:
        self.model.make_train_function()
        self.model.train()
        for _ in range(steps):
            self.model.train_function([self.batch])


class NightlyTraining(KerasTraining):
    """Under the ModelParallel that Keras brings for torch after 3.15."""

    def in_place(self, x: Any, y: Any) -> Any:
        from keras.src.backend.torch.trainer import _distribute_data

        return _distribute_data((x, y))


class JaxTraining(KerasTraining):
    """Compiled, on JAX."""

    state: Any = None

    def in_place(self, x: Any, y: Any) -> Any:
        from keras.src.backend.jax.trainer import _distribute_data

        return _distribute_data((x, y))

    def set_rate(self, rate: float) -> None:
        assert self.state is None, "the variables are let go of when the first run begins"
        super().set_rate(rate)

    def run(self, steps: int) -> None:
        import jax

        if self.state is None:  # as `fit` does
            self.state = self.model._get_jax_state(
                trainable_variables=True,
                non_trainable_variables=True,
                optimizer_variables=True,
                metrics_variables=True,
                purge_model_variables=True,
            )
        for _ in range(steps):
            _, self.state = self.model.train_function(self.state, iter([self.batch]))
        jax.block_until_ready(self.state)

    def compiled_step(self) -> str:
        """The program that a device runs, as XLA wrote it."""
        import jax

        shardings = None, jax.tree.map(lambda array: array.sharding, self.state)
        step = jax.jit(self.model.train_step, donate_argnums=0, out_shardings=shardings)
        return step.lower(self.state, self.batch).compile().as_text()


def plain(size: Size) -> KerasTraining:
    return KerasTraining(encoder(size), size)


def by_keras_tp(size: Size, jit_compile: bool = False) -> KerasTraining:
    import torch.distributed as dist

    import keras_tp

    mesh = keras_tp.device_mesh({"batch": 1, "model": dist.get_world_size()})
    return KerasTraining(
        encoder(size),
        size,
        jit_compile,
        lambda model: keras_tp.parallelize(model, layout_map(mesh, size)),
    )


def model_parallel(size: Size, training: type[KerasTraining]) -> KerasTraining:
    """Under Keras's own ModelParallel, on all devices there are."""
    devices = keras.distribution.list_devices()
    mesh = keras.distribution.DeviceMesh((1, len(devices)), ["batch", "model"], devices)
    keras.distribution.set_distribution(
        keras.distribution.ModelParallel(layout_map=layout_map(mesh, size), batch_dim_name="batch")
    )
    return training(encoder(size), size, jit_compile=training is JaxTraining)
