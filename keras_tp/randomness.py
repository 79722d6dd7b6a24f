"""The random state of a rank: what decides how `fit` shuffles and which masks dropout draws.

Python's numbers, NumPy's, torch's and those behind unseeded `keras.random`. (Seeds of layers
are variables of the model.)
"""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy as np
import torch

from keras_tp.seam.seeds import global_seed, set_global_seed


def random_state() -> dict[str, Any]:
    """The state, in lists, numbers and strings that JSON gives back as they were."""
    name, keys, *rest = tuple(np.random.get_state(legacy=True))
    seed = global_seed()
    state = {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": _text(torch.get_rng_state()),
        "keras": None if seed is None else [str(seed.dtype), seed.tolist()],
    }
    if torch.cuda.is_available():
        state["cuda"] = _text(torch.cuda.get_rng_state())
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Goes back to what `random_state` gave, on this device or another.

    A state of no CUDA leaves that of CUDA as it is.
    """
    seed = state["keras"]
    # First, for making Keras's generator draws from Python's numbers.
    set_global_seed(None if seed is None else np.array(seed[1], dtype=seed[0]))
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, numbers, *rest = state["numpy"]
    np.random.set_state((name, np.array(numbers, dtype="uint32"), *rest))
    torch.set_rng_state(_bytes(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(state["cuda"]))


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
