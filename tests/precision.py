"""float64 that is float64, on any Keras backend."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import keras
from keras.src.backend.common import dtypes


@contextlib.contextmanager
def real_float64(on: bool = True) -> Iterator[None]:
    """Makes Keras compute float64 models in float64.

    On torch and JAX, `keras.backend.result_type("float64", "float64")` is "float32": matmul,
    layer norms and attention of a float64 model silently compute in float32, and
    a difference of 1e-7 could be rounding or a bug. Without that step it is a bug.
    """
    if not on:
        yield
        return
    keras.config.set_floatx("float64")
    before = dtypes.BIT64_TO_BIT32_DTYPE["float64"]
    dtypes.BIT64_TO_BIT32_DTYPE["float64"] = "float64"
    try:
        yield
    finally:
        dtypes.BIT64_TO_BIT32_DTYPE["float64"] = before
        keras.config.set_floatx("float32")
