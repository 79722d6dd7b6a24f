"""What of a model is in a checkpoint: its weights, its optimizer's state, its metrics."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from keras_tp.errors import CheckpointError
from keras_tp.layouts import Shape
from keras_tp.manifests import Manifest
from keras_tp.seam.layers import variables_of, walk_layers
from keras_tp.seam.variables import local_tensor, sharding_of


class Contents:
    """A model's variables by the names that they have in checkpoints.

    Args:
        model: built. If it is compiled, its optimizer is built here (collective where it
            has sharded slots), and is part of the contents.

    Raises:
        CheckpointError: a model that is not built.

    Attributes:
        variables: by name, such as `"weights.dense/kernel"`.
        optimizer: the class of the optimizer, or None.
    """

    def __init__(self, model: Any):
        if not getattr(model, "built", False):
            raise CheckpointError(
                f"'{getattr(model, 'name', model)}' is no model that is built: call it on data, "
                "or give it an Input.",
                where="this model",
            )
        optimizer = getattr(model, "optimizer", None)
        if optimizer is not None and not optimizer.built:
            optimizer.build(model.trainable_variables)
        self.optimizer = None if optimizer is None else type(optimizer).__name__
        self.variables = _named("weights", variables_of(walk_layers(model)))
        if optimizer is not None:
            self.variables |= _named("optimizer", optimizer.variables, numbered=True)
        self.variables |= _named("metrics", getattr(model, "metrics_variables", ()))

    def leave_out_metrics_but(self, manifest: Manifest) -> None:
        """Leaves out metrics that the checkpoint has not, which is no reason to refuse it."""
        for name in [name for name in self.variables if name.startswith("metrics.")]:
            saved = manifest.tensors.get(name)
            if saved is None or (saved.shape, saved.dtype) != self._kind(name):
                del self.variables[name]

    def wanted(self) -> dict[str, tuple[Shape, str]]:
        """Full shape and dtype of all but the metrics."""
        return {n: self._kind(n) for n in self.variables if not n.startswith("metrics.")}

    def _kind(self, name: str) -> tuple[Shape, str]:
        variable = self.variables[name]
        dtype = str(local_tensor(variable).dtype).removeprefix("torch.")
        return tuple(variable.shape), dtype

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """What is saved, in torch's way: of shards DTensors in their memory. No communication."""
        nested: dict[str, dict[str, torch.Tensor]] = {}
        for name, variable in self.variables.items():
            group, short = name.split(".", 1)
            local, sharding = local_tensor(variable).detach(), sharding_of(variable)
            whole = local if sharding is None else sharding.dtensor(local)
            nested.setdefault(group, {})[short] = whole
        return nested

    def stored(self, copied: bool) -> dict[str, torch.Tensor]:
        """What this rank stores, by name; copied to the host's memory, or as it is."""
        return {
            name: local_tensor(v).detach().to("cpu", copy=True)
            if copied
            else local_tensor(v).detach()
            for name, v in self.variables.items()
        }

    def room(self) -> dict[str, torch.Tensor]:
        """Memory of the host for what `stored` gives."""
        return {n: torch.empty_like(t, device="cpu") for n, t in self.stored(False).items()}


def _named(group: str, variables: Iterable[Any], numbered: bool = False) -> dict[str, Any]:
    """Variables by path. `numbered` has optimizers' own names, which count up, made numbers."""
    named: dict[str, Any] = {}
    owners: dict[str, int] = {}
    for variable in variables:
        path = variable.path
        if numbered and "/" in path:
            owner, path = path.split("/", 1)
            number = owners.setdefault(owner, len(owners))
            path = f"{number}/{path}" if number else path
        times, name = 1, f"{group}.{path}"
        while name in named:
            times += 1
            name = f"{group}.{path}#{times}"
        named[name] = variable
    return named
