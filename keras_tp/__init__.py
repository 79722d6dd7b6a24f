"""Tensor-parallel Keras on PyTorch. The tour of the package is `keras_tp/api.py`."""

from keras_tp import backend  # noqa: F401, first: it picks torch before Keras is imported
from keras_tp.api import (
    auto_layout_map,
    disable,
    enable,
    full_weights,
    local_shapes,
    parallelize,
    plan,
    verify,
)
from keras_tp.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from keras_tp.checks import LayerCheck, Verification
from keras_tp.data import DataSharder
from keras_tp.errors import CheckpointError, LayoutError, LayoutWarning
from keras_tp.job import initialize
from keras_tp.mesh import device_mesh
from keras_tp.plans import LayerPlan, Plan, VariablePlan
from keras_tp.prices import Cost
from keras_tp.proposals import Proposal
from keras_tp.version import __version__

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Cost",
    "DataSharder",
    "LayerCheck",
    "LayerPlan",
    "LayoutError",
    "LayoutWarning",
    "Plan",
    "Proposal",
    "VariablePlan",
    "Verification",
    "__version__",
    "auto_layout_map",
    "device_mesh",
    "disable",
    "enable",
    "full_weights",
    "initialize",
    "load_checkpoint",
    "local_shapes",
    "parallelize",
    "plan",
    "save_checkpoint",
    "verify",
]
