"""What a plan says of a layout that would send less. Pure: no ranks."""

from __future__ import annotations

from typing import Any

import keras
import models
import parity

import keras_tp

# As in KerasHub's maps (keras-hub #2827): what layers contract is cut, not heads or units.
WRONG = {
    "tokens/embeddings": ("model", None),
    ".*(query|key|value)/kernel": ("model", None, None),
    ".*attention_output/kernel": (None, None, "model"),
    r"up_\d+/kernel": ("model", None),
    r"down_\d+/kernel": (None, "model"),
}
MESH = {"batch": 1, "model": 2}


def advice(plan: keras_tp.Plan) -> list[str]:
    return [note for note in plan.notes if note.startswith("a better layout")]


def planned(model: Any, layout: dict[str, Any], mesh: Any = MESH, **options: Any) -> keras_tp.Plan:
    return keras_tp.plan(model, parity.layout_map(layout, mesh), **options)


def test_a_wrong_axis_is_told_and_what_it_costs() -> None:
    """A map that shards the contracted dims trains with right numbers and twelve gathers a step
    too many, and nobody is told; or the layout that is named does not save what it says.

    Seen to fail with `_costs` giving False, and with the proposal's own counts, which cut the head.
    """
    model = models.transformer()
    plan = planned(model, WRONG)
    (note,) = advice(plan)
    assert "'attention_\\d+/query/kernel': (None, 'model', None)" in note
    assert "by 9 all_reduce, instead of 12 all_gather + 13 all_reduce" in note
    assert plan.layers == planned(model, WRONG, advise=False).layers
    right = {k: v for k, v in models.TRANSFORMER_LAYOUT.items() if not k.startswith("head")}
    better = planned(model, right)
    counts = better.collectives("forward") + better.collectives("backward")
    assert counts == {"all_reduce": 9}
    assert not advice(better)


def test_where_there_is_nothing_better() -> None:
    """Advice that would cut what is meant to be whole, or take more memory: Megatron-LM's layout, a
    layer alone, weights cut along the replicas' axis only, a mesh of one rank."""
    assert not advice(planned(models.transformer(), models.TRANSFORMER_LAYOUT))
    alone = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8, name="alone")])
    assert not advice(planned(alone, {".*alone/kernel": (None, "model")}))
    rows = {".*up_.*kernel": ("batch", None)}
    assert not advice(planned(models.transformer(), rows, {"batch": 2, "model": 1}))
