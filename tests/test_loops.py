"""Training loops of one's own with optimizers of torch's: right, or refused."""

from __future__ import annotations

from typing import Any

import features
import keras
import numpy as np
import parity
import pytest
import scripts
import torch
from keras import layers
from precision import real_float64
from torch.nn.utils import clip_grad_norm_

import keras_tp
from keras_tp.loops import ELEMENTWISE

X = np.random.default_rng(1).standard_normal((5, 6))
LAYOUT = {
    ".*up/kernel": ("batch", "model"),
    ".*up/bias": ("model",),
    ".*down/kernel": ("model", None),
}


def small() -> Any:
    return keras.Sequential(
        [keras.Input((6,)), layers.Dense(8, "tanh", name="up"), layers.Dense(4, name="down")]
    )


def loop(model: Any, optimizer: Any) -> list[float]:
    """The README's."""
    losses = []
    for x, y in ((torch.tensor(X[:n]), torch.tensor(X[:n, :4])) for n in (5, 3, 1)):
        optimizer.zero_grad()
        loss = ((model(x, training=True) - y) ** 2).mean() + sum(model.losses)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def each_optimizer(mesh: str) -> dict[str, float]:
    found = {}
    with real_float64():
        for kind in ELEMENTWISE:
            options = {} if kind in (torch.optim.Adadelta, torch.optim.Adagrad) else {"lr": 0.01}
            options |= {"weight_decay": 0.1} if kind is not torch.optim.Rprop else {}
            # Made before the model was parallelized; one that makes its state at once is then
            # told by torch that it has another shape.
            for before in (False, True) if kind is torch.optim.Adam else (False,):
                seen = []
                for parallelized in (False, True):
                    model = parity.build_seeded(small)
                    optimizer = kind(model.parameters(), **options)
                    if parallelized:
                        keras_tp.parallelize(model, scripts.layout_on(LAYOUT, mesh))
                    if not before:
                        optimizer = kind(model.parameters(), **options)
                    seen.append([loop(model, optimizer), *keras_tp.full_weights(model).values()])
                found[f"{kind.__name__} {'before' * before}"] = scripts.difference(*seen)
    return found


@pytest.mark.parametrize("mesh", features.MESHES)
def test_every_torch_optimizer_that_is_let_in(ranks: Any, record_property: Any, mesh: str) -> None:
    """The list of elementwise optimizers is a claim; and one that was made before `parallelize`
    would update weights that nobody reads any more.

    Seen to fail with Adafactor in the list.
    """
    answers = ranks(scripts.size_of(mesh))(each_optimizer, mesh, timeout=180)
    feature = f"{len(ELEMENTWISE)} optimizers of torch.optim"
    features.note_worst(record_property, "loops", mesh, feature, answers)


class Whole(torch.optim.SGD):
    """A user's; what it does nobody knows."""


def refused() -> tuple[dict[str, str], bool]:
    """What is said of other optimizers, of shards and of whole weights, and if one may insist."""
    kinds = [k for k in vars(torch.optim).values() if isinstance(k, type)]
    kinds = [k for k in kinds if issubclass(k, torch.optim.Optimizer) and k not in ELEMENTWISE]
    told = {}
    for axes, layout in (({"model": 2}, {".*up/kernel": (None, "model")}), ({"batch": 2}, {})):
        for kind in [*kinds, Whole]:
            if kind in (torch.optim.Optimizer, torch.optim.SparseAdam):
                continue
            model = parity.build_seeded(small)
            keras_tp.parallelize(model, parity.layout_map(layout, axes))
            weights = [p for p in model.parameters() if p.dim() == 2]  # Muon takes no others
            optimizer = kind(weights, lr=0.01)
            ((model(torch.tensor(X).float())) ** 2).mean().backward()
            try:
                optimizer.step(lambda: 0.0) if kind is torch.optim.LBFGS else optimizer.step()
                said = "stepped"
            except keras_tp.LayoutError as error:
                said = str(error)
            told[f"{kind.__name__} on {next(iter(axes))}"] = said
            if kind is Whole and layout:
                before = keras_tp.full_weights(model)
                optimizer.elementwise = True
                optimizer.step()
                after = keras_tp.full_weights(model)
    return told, any((before[path] != after[path]).any() for path in before)


def test_torch_optimizers_that_look_at_whole_weights_are_refused(ranks: Any) -> None:
    """Adafactor's moments, Muon's orthogonal updates and the products of LBFGS, of shards: other
    numbers, and in silence. Of whole weights they are those of one process.
    """
    for told, moved in ranks(2)(refused):
        assert {"Adafactor on model", "LBFGS on model", "Whole on model"} <= set(told)
        for name, said in told.items():
            if name.endswith("model"):
                assert "is not known to update every element alone" in said, name
                assert "1 of the weights" in said
                assert "'sequential/up/kernel'" in said
            else:
                assert said == "stepped", name
        assert moved


# Imported before anything is parallelized, as scripts do.
CLIPS = {
    "2": lambda p: torch.nn.utils.clip_grad_norm_(p, 0.05),
    "3, one by one": lambda p: clip_grad_norm_(p, 0.05, norm_type=3.0, foreach=False),
    "inf": lambda p: clip_grad_norm_(p, 0.01, norm_type=torch.inf),
    "get_total_norm": lambda p: torch.nn.utils.get_total_norm([t.grad for t in p]),
}


def clipped(mesh: str) -> dict[str, features.Found]:
    found = {}
    with real_float64():
        one, many = (parity.build_seeded(small) for _ in range(2))
        keras_tp.parallelize(many, scripts.layout_on(LAYOUT, mesh))
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (one, many)]
        for name, clip in CLIPS.items():
            norms = []
            for model, optimizer in zip((one, many), optimizers, strict=True):
                optimizer.zero_grad()
                (
                    (model(torch.tensor(X), training=True) - torch.tensor(X[:, :4])) ** 2
                ).mean().backward()
                norms.append(clip(list(model.parameters())).item())
                optimizer.step()
            weights = [list(keras_tp.full_weights(m).values()) for m in (one, many)]
            gap = max(map(parity.difference, *weights))
            found[f"clip by norm: {name}"] = features.exact(max(gap, parity.difference(*norms)))
        for p in many.parameters():
            p.grad.fill_(torch.nan)
        with pytest.raises(RuntimeError, match="non-finite"):
            clip_grad_norm_(many.parameters(), 1.0, error_if_nonfinite=True)
    return found


@pytest.mark.parametrize("mesh", features.MESHES)
def test_clipping_by_norm(ranks: Any, record_property: Any, mesh: str) -> None:
    """Each rank clipped by the norm of its shards, so that replicated weights drifted apart; a
    weight that two ranks store must count once."""
    answers = ranks(scripts.size_of(mesh))(clipped, mesh)
    features.note(record_property, "loops", mesh, answers)
