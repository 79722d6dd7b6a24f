"""Keras's callbacks: where they are told what happens, and where they print.

`fit`, `evaluate`, `predict`, and training loops of one's own, make a
`CallbackList` and call its `set_model` and `on_...`, which call those of each
callback in `callbacks`. `_async_train`, `_async_test` and `_async_predict` say
whether that is done in a thread. All that Keras itself prints meanwhile goes by
`io_utils.print_msg`. `BackupAndRestore` sets a model's `_initial_epoch`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Protocol

from keras.src.callbacks.callback import Callback
from keras.src.callbacks.callback_list import CallbackList
from keras.src.utils import io_utils
from keras.src.utils.python_utils import pythonify_logs

_ATTENDANCE = "_keras_tp_attendance"


class Attendance(Protocol):
    """What is done with a list of callbacks that belongs to all ranks together."""

    def attend(self, event: str, given: dict[str, Any], tell: Callable[[list[Any]], None]) -> None:
        """Has `tell(callbacks)` tell of `event`: those of the list, or what acts for them.

        Args:
            event: the method of `CallbackList` that was called.
            given: its arguments, which may be changed.
            tell: calls the method of each.
        """


def hook_callbacks(attendance: Callable[[Any, list[Any]], Attendance | None]) -> None:
    """Has lists of callbacks go by what `attendance(model, callbacks)` gives. Idempotent.

    For None, which is asked for again as training, evaluation or prediction
    begins, nothing changes.
    """
    if hasattr(CallbackList.set_model, "_keras_tp"):
        return
    for name, method in list(vars(CallbackList).items()):
        if name == "set_model" or name.startswith("on_"):
            setattr(CallbackList, name, _attended(name, method, attendance))
    io_utils.print_msg = _unless_quiet(io_utils.print_msg)


def _attended(name: str, original: Any, attendance: Any) -> Any:
    signature = inspect.signature(original)
    begins = name in ("set_model", "on_train_begin", "on_test_begin", "on_predict_begin")

    @functools.wraps(original)
    def event(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        given, attributes = bound.arguments, vars(self)
        if begins and attributes.get(_ATTENDANCE) is None:
            model = given["model"] if name == "set_model" else attributes.get("_model")
            found = None if model is None else attendance(model, self.callbacks)
            attributes[_ATTENDANCE] = found
        attending: Attendance | None = attributes.get(_ATTENDANCE)
        if attending is None:
            return original(self, *args, **kwargs)
        # Beside the training step, callbacks and the step would gather in either order.
        self._async_train = self._async_test = self._async_predict = False
        if "logs" in given:
            given["logs"] = pythonify_logs(given["logs"])
        listed = self.callbacks

        def tell(callbacks: list[Any]) -> None:
            self.callbacks = callbacks
            try:
                original(*bound.args, **bound.kwargs)
            finally:
                self.callbacks = listed

        return attending.attend(name, given, tell)

    event._keras_tp = True  # type: ignore[attr-defined]
    return event


def listens(callback: Any, event: str) -> bool:
    """Whether `callback` does anything at `event`."""
    # What a callback does not say for batches of training is what it says for batches.
    names = {event, event.replace("train_batch", "batch")}
    return any(
        name in vars(callback) or getattr(type(callback), name) is not getattr(Callback, name)
        for name in names
    )


def is_kerass(callback: Any) -> bool:
    """Whether `callback` is one of Keras's own."""
    return _is_kerass(type(callback))


def derived_from_kerass(callback: Any) -> bool:
    """Whether `callback` is one of Keras's own, or derived from one that does something."""
    return any(_is_kerass(cls) and cls is not Callback for cls in type(callback).__mro__)


def _is_kerass(cls: type) -> bool:
    return cls.__module__.startswith("keras.")


def initial_epoch(model: Any) -> int | None:
    """The epoch in which training begins, if that is not for `fit` to say."""
    return getattr(model, "_initial_epoch", None)


def set_initial_epoch(model: Any, epoch: int | None) -> None:
    """Sets what `initial_epoch` gives."""
    if initial_epoch(model) != epoch:
        model._initial_epoch = epoch


_QUIET: ContextVar[bool] = ContextVar("keras_tp_quiet", default=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """While open, Keras prints nothing, after `hook_callbacks`."""
    token = _QUIET.set(True)
    try:
        yield
    finally:
        _QUIET.reset(token)


def _unless_quiet(original: Any) -> Any:
    @functools.wraps(original)
    def print_msg(*args: Any, **kwargs: Any) -> None:
        if not _QUIET.get():
            original(*args, **kwargs)

    return print_msg
