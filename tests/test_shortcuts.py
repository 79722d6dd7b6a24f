"""The short way into layers that compute on shards does what Keras's long one does, or is not gone.

Seen to fail, each with its line left out of keras_tp/seam/shortcuts.py: the cases of CASES by name;
with `takes_tensor` False: the first test.
"""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Callable
from typing import Any

import keras
import parity
import pytest
import torch
from keras import layers

import keras_tp
from keras_tp.seam import shortcuts

WIDTH, HIDDEN = 6, 8
LAYOUT = {".*up/kernel": (None, "model"), ".*up/bias": ("model",), ".*down/kernel": ("model", None)}


class Told(layers.Layer):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(name="told", autocast=False)
        self.supports_masking = True
        self.heard: list[Any] = []

    def call(self, x: Any, training: Any = None, mask: Any = None) -> Any:
        self.heard.append((training, None if mask is None else tuple(mask.shape), str(x.dtype)))
        return x


class Masking(layers.Dense):
    """Puts a mask on what it gives."""

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> Any:
        return torch.ones(inputs.shape[:-1], dtype=torch.bool)


class Pair(layers.Layer):
    """A column layer, a row layer, and one that listens after each."""

    def __init__(self, **options: Any) -> None:
        super().__init__(name="pair", autocast=False)
        self.options = options.pop("options", {})
        self.masked = options.pop("masked", False)
        self.up = options.pop("column", layers.Dense)(HIDDEN, name="up", **options)
        self.told = Told()
        self.down = layers.Dense(WIDTH, name="down", **options)

    def build(self, shape: Any) -> None:
        self.up.build(shape)
        self.told.build(shape)
        self.down.build((*shape[:-1], HIDDEN))

    def call(self, x: Any, training: Any = None) -> Any:
        if self.masked:
            x._keras_mask = torch.ones(x.shape[:-1], dtype=torch.bool)
        return self.told(self.down(self.told(self.up(x, **self.options))))


def made(**options: Any) -> Any:
    keras.utils.set_random_seed(0)
    x = keras.Input((3, WIDTH))
    model = keras.Model(x, Pair(**options)(x))
    layout_map = parity.layout_map(LAYOUT, {"batch": 1, "model": 2})
    return keras_tp.parallelize(model, layout_map, check_batches=False)


def step(model: Any) -> list[Any]:
    """All that comes of a step: numbers of this rank, and what was heard."""
    for variable in model.trainable_variables:
        variable.value.grad = None
    heard = model.get_layer("pair").told.heard
    heard.clear()
    x = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(1))
    output = model(x, training=False)
    losses = list(model.losses)
    torch.autograd.backward([output.float().sum() + sum(losses, torch.zeros(()))])
    gradients = [v.value.grad for v in model.trainable_variables]
    return [output.detach(), *gradients, *(loss.detach() for loss in losses), *heard]


def both(monkeypatch: pytest.MonkeyPatch, model: Any) -> tuple[list[Any], list[Any], list[str]]:
    """A step the short way and the long way, and the layers that went the short way."""
    taken: list[str] = []
    is_simple = shortcuts._is_simple

    def watched(layer: Any, args: Any, kwargs: Any) -> bool:
        simple = is_simple(layer, args, kwargs)
        taken.extend([layer.name] if simple else [])
        return simple

    step(model)  # what is looked at once
    with monkeypatch.context() as patch:
        patch.setattr(shortcuts, "_is_simple", watched)
        short = step(model)
        patch.setattr(shortcuts, "_is_simple", lambda *given: False)
        return short, step(model), taken


def same(one: list[Any], other: list[Any]) -> bool:
    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor):
            return torch.equal(a, b) and a.dtype is b.dtype
        return bool(a == b)

    return len(one) == len(other) and all(map(equal, one, other))


def calls(model: Any) -> int:
    profile = cProfile.Profile()
    profile.runcall(step, model)
    return int(pstats.Stats(profile).total_calls)


def test_the_short_way_is_shorter(monkeypatch: pytest.MonkeyPatch, fake_ranks: Any) -> None:
    """The same numbers to the last bit, by hundreds of calls less for each layer."""
    fake_ranks(0, 2)
    model = made()
    short, long, taken = both(monkeypatch, model)
    assert same(short, long)
    assert taken == ["up", "down"]
    few = calls(model)
    monkeypatch.setattr(shortcuts, "_is_simple", lambda *given: False)
    assert few < calls(model) - 2 * 300


def hooked(model: Any) -> None:
    told = model.get_layer("pair").told
    model.get_layer("pair").up.register_forward_hook(lambda *given: told.heard.append("hooked"))


def penalized(model: Any) -> None:
    model.get_layer("pair").up.activity_regularizer = keras.regularizers.L2(0.1)


def unchanged(model: Any) -> None:
    pass


# Options of the pair, and what is done to the model.
CASES: dict[str, tuple[dict[str, Any], Callable[[Any], None]]] = {
    "a hook": ({}, hooked),
    "a penalty": ({}, penalized),
    "a mask": ({"masked": True}, unchanged),
    "a mask of its own": ({"column": Masking}, unchanged),
    "training said": ({"options": {"training": True}}, unchanged),
    "of mixed dtypes": ({"dtype": "mixed_bfloat16"}, unchanged),
    "another dtype": ({"dtype": "bfloat16"}, unchanged),
}


@pytest.mark.filterwarnings("ignore::keras_tp.LayoutWarning")  # a penalty sees the whole output
@pytest.mark.parametrize("name", CASES)
def test_where_more_is_to_be_done_it_is_done(
    monkeypatch: pytest.MonkeyPatch, fake_ranks: Any, name: str
) -> None:
    """A hook that is not called, a penalty that is not added, a mask that ends, ..."""
    fake_ranks(0, 2)
    options, change = CASES[name]
    model = made(**options)
    change(model)
    short, long, taken = both(monkeypatch, model)
    assert same(short, long)
    assert "up" not in taken


def test_a_wrong_shape_is_refused(fake_ranks: Any) -> None:
    """Keras's own error, not one of torch's, or none."""
    fake_ranks(0, 2)
    model = made()
    pair = model.get_layer("pair")
    pair.call = lambda x: pair.up(x)
    with pytest.raises(ValueError, match="expected axis -1 of input shape to have value 6"):
        pair(torch.zeros(2, 3, WIDTH + 1))
