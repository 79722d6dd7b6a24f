"""The generator behind `keras.random` calls without a seed."""

from __future__ import annotations

import numpy as np
from keras.src.backend.common import global_state
from keras.src.random.seed_generator import GLOBAL_SEED_GENERATOR, global_seed_generator


def global_seed() -> np.ndarray | None:
    """State of the generator behind `keras.random` calls without a seed, if there is one yet."""
    made = global_state.get_global_attribute(GLOBAL_SEED_GENERATOR)
    return None if made is None else made.state.numpy()


def set_global_seed(state: np.ndarray | None) -> None:
    """Sets what `global_seed` gives. Making the generator draws from Python's random numbers."""
    if state is None:
        global_state.set_global_attribute(GLOBAL_SEED_GENERATOR, None)
    else:
        global_seed_generator().state.assign(state)
