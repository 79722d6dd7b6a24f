"""The metrics of a training step, computed without values. Afterwards they are as before."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
from keras.src.trainers.compile_utils import CompileMetrics

Call = Callable[..., Any]


def has_metrics(model: Any) -> bool:
    """Whether a model is compiled with metrics."""
    return getattr(model, "_compile_metrics", None) is not None


class _Tried(CompileMetrics):
    """The metrics that a model is compiled with once more: where one fails, the others go on."""

    def __init__(self, own: CompileMetrics, tried: Callable[[str, Call], Call]):
        super().__init__(
            own._user_metrics, own._user_weighted_metrics, output_names=own.output_names
        )
        self._tried = tried

    def build(self, y_true: Any, y_pred: Any) -> None:
        super().build(y_true, y_pred)
        for metric in self.metrics:
            vars(metric)["update_state"] = self._tried(metric.name, metric.update_state)
            # (What it makes of its own state, which is whole, asks nothing of other ranks.)
            vars(metric)["result"] = self._tried("", metric.result)


def metrics_in_training(
    model: Any, x: Any, y: Any, y_pred: Any, sample_weight: Any, asks: Callable[[Any], bool]
) -> dict[str, Exception]:
    """Updates the metrics as a training step does, within a rehearsal.

    Gives the names of those that could not go on without values, though they were given what
    `asks` says they may ask other ranks about, and what stopped them; as `"compute_metrics"` what
    stopped code of the model's own around them.
    """
    failed: dict[str, Exception] = {}

    def tried(name: str, original: Call) -> Call:
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            told = asks((args, kwargs))
            try:
                return original(*args, **kwargs)
            except Exception as error:
                if told:
                    failed.setdefault(name, error)
                return None

        return call

    with _as_before(_metrics_of(model)):
        if has_metrics(model):
            vars(model)["_compile_metrics"] = _Tried(model._compile_metrics, tried)
        try:
            model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
        except Exception as error:
            failed["compute_metrics"] = error
    return failed


def _metrics_of(model: Any) -> list[Any]:
    found = list(model.metrics)
    if has_metrics(model):
        own = model._compile_metrics
        given = keras.tree.flatten((own._user_metrics, own._user_weighted_metrics))
        found += [metric for metric in given if isinstance(metric, keras.metrics.Metric)]
    for metric in found:  # which grows: those that metrics are made of
        found += [inner for inner in metric._metrics if all(inner is not m for m in found)]
    return found


@contextlib.contextmanager
def _as_before(metrics: Iterable[Any]) -> Iterator[None]:
    """Afterwards metrics have the attributes and variables they had: some are built as they run."""
    before = []
    for metric in metrics:
        tracked = metric._tracker
        stores = [(store, list(store)) for _, store in tracked.config.values()]
        ids = {name: set(known) for name, known in tracked.stored_ids.items()}
        before.append((vars(metric), dict(vars(metric)), stores, tracked.stored_ids, ids))
    try:
        yield
    finally:
        for attributes, kept, stores, stored_ids, ids in before:
            for store, entries in stores:
                store[:] = entries
            stored_ids.update(ids)
            attributes.clear()
            attributes.update(kept)
