"""Keras must compute with torch; this says so in time."""

from __future__ import annotations

import os
import sys

from keras_tp.errors import LayoutError

# Without a choice Keras picks TensorFlow, which nobody who imports this has in
# mind. A choice made by the environment, or by importing Keras first, stands.
if "keras" not in sys.modules:
    os.environ.setdefault("KERAS_BACKEND", "torch")


def require_torch() -> None:
    """Raises LayoutError unless Keras's backend is torch."""
    import keras

    if keras.config.backend() != "torch":
        raise LayoutError(
            f"Keras's backend is {keras.config.backend()!r}; keras_tp needs 'torch'. Set "
            "KERAS_BACKEND=torch before Keras is imported.",
            where="this environment",
        )
