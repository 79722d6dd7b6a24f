"""Trains the cases of `oracle_cases` with Keras on JAX and writes what comes out.

    python tests/jax_oracle.py FOLDER    # with ENVIRONMENT

Each case three times: on one device, and under `keras.distribution.ModelParallel` on each mesh, of
virtual CPU devices. A file `CASE - MESH.npz` each, of float64 arrays by name.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from pathlib import Path
from typing import Any

import keras
import numpy as np
import oracle_cases
import precision
from rank_pool import KERAS_ARRAY_WARNING

ALONE = "one device"
DEVICES = 4
# What the process needs in its environment.
ENVIRONMENT = {
    "KERAS_BACKEND": "jax",
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": str(DEVICES),
    "JAX_ENABLE_X64": "1",
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
}


def file(folder: Path, name: str, mesh: str) -> Path:
    return folder / f"{name} - {mesh}.npz"


class Noted(keras.distribution.ModelParallel):
    """Notes the layer outputs it found a layout for, in traces and out of them."""

    def __init__(self, layout_map: Any):
        super().__init__(layout_map=layout_map, batch_dim_name="batch")
        self.outputs: set[str] = set()

    def get_tensor_layout(self, path: str) -> Any:
        layout = super().get_tensor_layout(path)
        if layout is not None:
            self.outputs.add(path)
        return layout


def attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    bias: Any,
    mask: Any,
    scale: Any,
    is_causal: bool,
    implementation: str,
) -> Any:
    """`jax.nn.dot_product_attention`, whose softmax is float32 whatever it is given."""
    import jax.numpy as jnp
    from jax.nn import softmax

    assert bias is None
    scores = jnp.einsum("btnh,bsnh->bnts", query, key) * scale
    seen = jnp.ones(scores.shape[-2:], bool)
    if is_causal:
        seen = jnp.tril(seen)
    if mask is not None:
        seen = seen & mask
    scores = jnp.where(seen, scores, jnp.finfo(scores.dtype).min)
    return jnp.einsum("bnts,bsnh->btnh", softmax(scores, axis=-1), value)


def run(case: oracle_cases.Case, mesh: str) -> dict[str, Any]:
    keras.utils.clear_session()  # which would clear the distribution too
    distribution = None if mesh == ALONE else Noted(case.layout_map(mesh))
    with distribution.scope() if distribution else contextlib.nullcontext():
        model = oracle_cases.built(case)
        result = oracle_cases.trained(model, case)
    for w in model.weights:
        result[f"local {w.path}"] = np.array(w.value.sharding.shard_shape(w.value.shape))
        devices = 1 if distribution is None else distribution.device_mesh.devices.size
        assert len(w.value.sharding.device_set) == devices, (w.path, w.value.sharding)
    result["outputs with a layout"] = np.array(sorted(distribution.outputs if distribution else ()))
    return result


def main(folder: Path) -> None:
    import jax

    assert keras.config.backend() == "jax"
    assert len(jax.devices()) == DEVICES
    assert jax.config.jax_enable_x64
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message=KERAS_ARRAY_WARNING)
    jax.nn.dot_product_attention = attention
    with precision.real_float64():
        for name, case in oracle_cases.CASES.items():
            for mesh in (ALONE, *oracle_cases.MESHES):
                np.savez(file(folder, name, mesh), allow_pickle=False, **run(case, mesh))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
