"""What each Keras layer type can compute on shards, and at what price.

A rule reads a layer and says what its `call` does in terms that sharding can
be decided from: a `Contraction` (Dense, EinsumDense) or a `Lookup` (Embedding).
A layer without a rule, or one whose class changes the computation its rule
knows, has None and a reason; its sharded weights are gathered on use, which is
right for any layer.

The choices are Megatron-LM's (Shoeybi et al. 2019, section 3), read off an
einsum: a sharded label of the output makes a *column*, a contracted label a
*row*, a label of input, kernel and output alike a *batched* layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import torch
from torch.distributed.tensor import Partial, Replicate, Shard

from keras_tp.computations import Computation, Contraction, Lookup
from keras_tp.layouts import Layout, Shape
from keras_tp.plans import Collective, StylePlan


def computation_of(layer: Any) -> tuple[Computation | None, str]:
    """What the layer computes, or None and the reason why it is not known.

    Only the exact `call` and weights of the Keras class count: a subclass that
    overrides them, LoRA and quantization each change what is computed.
    """
    for cls, same, read in _RULES:
        if not isinstance(layer, cls):
            continue
        for attribute in same:
            if getattr(type(layer), attribute, None) is not getattr(cls, attribute, None):
                return None, f"{type(layer).__name__} overrides {cls.__name__}.{attribute}"
        if "call" in vars(layer):
            return None, "its call was replaced on the instance"
        if getattr(layer, "lora_enabled", False):
            return None, "LoRA adds to the weight"
        if getattr(layer, "quantization_mode", None) is not None:
            return None, f"the weight is quantized ({layer.quantization_mode})"
        return read(layer)
    return None, f"no rule computes {type(layer).__name__} on shards"


def _dense(layer: Any) -> tuple[Computation | None, str]:
    bias = "" if layer.bias is None else "y"
    return Contraction("...x", "xy", "...y", bias, "", _weights(bias)), ""


def _einsum_dense(layer: Any) -> tuple[Computation | None, str]:
    match = re.fullmatch(
        r"(\.\.\.)?([a-zA-Z]+)(\.\.\.)?,([a-zA-Z]+)->(\.\.\.)?([a-zA-Z]+)(\.\.\.)?",
        layer.equation.replace(" ", ""),
    )
    if match is None:
        return None, f"its equation {layer.equation!r} is not understood"
    head, inputs, tail, kernel, _, outputs, _ = match.groups(default="")
    if any(len(set(labels)) < len(labels) for labels in (inputs, kernel, outputs)):
        return None, f"its equation {layer.equation!r} repeats a label"
    bias = ""
    if layer.bias is not None:
        # Keras gives the bias one dim per output label from the first label of
        # `bias_axes` on, of size 1 where the label is not among them.
        bias = outputs[min(outputs.index(label) for label in layer.bias_axes) :]
        if len(bias) != len(layer.bias.shape):
            return None, f"the bias of {layer.equation!r} does not align with the output"
    return Contraction(
        input=head + inputs + tail,
        kernel=kernel,
        output=head + outputs + tail,
        bias=bias,
        equation=layer.equation,
        weights=_weights(bias),
    ), ""


def _embedding(layer: Any) -> tuple[Computation | None, str]:
    return Lookup(), ""


def _reversible_embedding(layer: Any) -> tuple[Computation | None, str]:
    if layer.tie_weights:
        return Lookup(("embeddings",), "embeddings"), ""
    return Lookup(("embeddings", "reverse_embeddings"), "reverse_embeddings"), ""


def _weights(bias: str) -> tuple[str, ...]:
    return ("kernel", "bias") if bias else ("kernel",)


# A class, the attributes that must be the class's own for its rule to hold, and
# what reads the computation off an instance.
_RULES: tuple[
    tuple[type[Any], tuple[str, ...], Callable[[Any], tuple[Computation | None, str]]], ...
] = (
    (keras.layers.Dense, ("call", "kernel", "__call__"), _dense),
    (keras.layers.EinsumDense, ("call", "kernel", "__call__"), _einsum_dense),
    *(
        (
            (
                keras.layers.ReversibleEmbedding,
                ("call", "embeddings", "__call__"),
                _reversible_embedding,
            ),
        )
        if hasattr(keras.layers, "ReversibleEmbedding")  # from Keras 3.12 on
        else ()
    ),
    (keras.layers.Embedding, ("call", "embeddings", "__call__"), _embedding),
)


@dataclass(frozen=True)
class Weight:
    """What a rule needs to know of one of a layer's own variables."""

    shape: Shape
    layout: Layout


def style_along(
    axis: str, computation: Computation | None, weights: dict[str, Weight]
) -> StylePlan | None:
    """The style a layer gets along `axis`, or None where nothing of it is sharded there.

    `weights` are the layer's own variables by name; a computation's come under
    the names it gives in `weights`.
    """
    if not any(axis in weight.layout for weight in weights.values()):
        return None
    if computation is None or axis not in weights[computation.weights[0]].layout:
        return gathered_along(axis)
    main = weights[computation.weights[0]]
    dim = main.layout.index(axis)
    size = main.shape[dim]
    if isinstance(computation, Lookup):
        if dim == 0:
            local = tuple(n for n in computation.weights if _words_of(n, weights[n], axis))
            return StylePlan(axis, "vocabulary", Replicate(), Partial(), local, size)
        if computation.reverse:  # which contracts the width
            return gathered_along(axis)
        return StylePlan(axis, "column", Replicate(), Shard(-1), ("embeddings",), size)
    label = computation.kernel[dim]
    if label not in computation.output:
        split = Shard(dim_of(label, computation.input))
        return StylePlan(axis, "row", split, Partial(), ("kernel",), size)
    # A bias sharded on the same label is added shard by shard, before the gather.
    # (One of size 1 there is broadcast over the label, and cannot be cut like it.)
    with_bias = "bias" in weights and any(
        (labelled, entry, count) == (label, axis, size)
        for labelled, entry, count in zip(
            computation.bias, weights["bias"].layout, weights["bias"].shape, strict=True
        )
    )
    local = ("kernel", "bias") if with_bias else ("kernel",)
    output = Shard(dim_of(label, computation.output))
    if label in computation.input:
        split = Shard(dim_of(label, computation.input))
        return StylePlan(axis, "batched", split, output, local, size)
    return StylePlan(axis, "column", Replicate(), output, local, size)


def _words_of(name: str, weight: Weight, axis: str) -> bool:
    """Whether it is the words along which one of a table's weights is cut by `axis`."""
    return axis in weight.layout and weight.layout.index(axis) == (name != "embeddings")


def bias_dim(style: StylePlan, computation: Contraction, shape: Shape) -> int | None:
    """Dim of a bias, from the end, of which a rank adds its part to its shard of the output.

    None where the bias is broadcast over the sharded dim.
    """
    assert isinstance(style.output, Shard)
    dim = style.output.dim
    if dim >= 0:  # labels lead, so that none before it is "..."
        dim -= len(computation.output)
    return dim if len(shape) >= -dim and shape[dim] == style.size else None


def gathered_along(axis: str) -> StylePlan:
    """The style of a layer that computes with full weights."""
    return StylePlan(axis, "gathered", Replicate(), Replicate())


def dim_of(label: str, labels: str) -> int:
    """Index of `label` among the dims `labels`, from the end if "..." leads.

    >>> dim_of("y", "...xy"), dim_of("y", "xy...")
    (-1, 1)
    """
    if labels.startswith("..."):
        plain = labels[3:]
        return plain.index(label) - len(plain)
    return labels.index(label)


def rows_of(layer: Any) -> str:
    """How a layer computes where replicas share out rows; see `LayerPlan.rows`.

    Keras's layers treat each row alone, but for those named here, and a layer of
    the user's is taken to do so until its first batch shows otherwise
    (`keras_tp.proof`). One that says `layer.all_rows = True` is given all rows.
    """
    if getattr(layer, "all_rows", False) or isinstance(layer, _MIXING):
        return "all"
    if next(torch.nn.Module.parameters(layer, recurse=False), None) is not None:
        return "all"  # torch parameters of its own, whose gradients cannot be followed
    if isinstance(layer, keras.layers.RNN) and layer.stateful:
        return "all"  # its state has a row for each row of the batch
    return "statistics" if isinstance(layer, keras.layers.BatchNormalization) else "own"


# They mix rows, draw random numbers in other shapes than by row, or (a torch module)
# read weights where gradients cannot be followed.
_MIXING = tuple(
    getattr(keras.layers, name)
    for name in (
        *("MixUp", "CutMix"),
        *("AugMix", "RandAugment", "RandomElasticTransform", "RandomGaussianBlur"),
        "TorchModuleWrapper",
    )
    if hasattr(keras.layers, name)
)


def collectives_of_rows(
    rows: str, axis: str
) -> tuple[tuple[Collective, ...], tuple[Collective, ...]]:
    """What a layer communicates that does not compute with its own rows alone."""
    if rows == "own":
        return (), ()
    if rows == "statistics":
        both = (Collective("all_reduce", axis, "statistics"),)
        return both, both
    return (
        (Collective("all_gather", axis, "input"),),
        (Collective("all_gather", axis, "output gradient"),),
    )


def collectives_of(
    style: StylePlan,
    computation: Computation | None,
    weights: dict[str, Weight],
    *,
    of_rows: bool = False,
    reversed_too: bool = False,
) -> tuple[tuple[Collective, ...], tuple[Collective, ...]]:
    """What `style` communicates in a forward and in a backward call.

    `arrives replicated -> Shard` is a slice, whose gradient is gathered; `Shard
    -> leaves replicated` is the other way round; `Partial -> replicated` is an
    all-reduce with nothing to do backward; and a replicated input used on
    sharded weights gets a partial gradient. Ids, which a lookup takes, get none. What is
    given or kept as a shard costs nothing, but for a bias that is whole: each rank has
    the gradient of its part (or, of one that is broadcast over the shard, a summand). What is
    open costs what the loss and metrics ask of it (`keras_tp.crossings`), which is not counted.
    A table that is called in reverse as well (`reversed_too`) is a column layer then.
    Where replicas compute other rows (`of_rows`), a gathered weight's gradients are
    summed and cut.
    """
    forward, backward = [], []
    for name, weight in weights.items():
        if style.axis in weight.layout and name not in style.local:
            forward.append(Collective("all_gather", style.axis, name))
            if of_rows:
                backward.append(Collective("reduce_scatter", style.axis, name))
    if isinstance(style.output, Partial):
        forward.append(Collective("all_reduce", style.axis, "output"))
    if isinstance(style.output, Shard) and not (style.kept or style.open):
        forward.append(Collective("all_gather", style.axis, "output"))
    if reversed_too and isinstance(computation, Lookup) and computation.reverse in style.local:
        if not style.open:
            forward.append(Collective("all_gather", style.axis, "logits"))
        backward.append(Collective("all_reduce", style.axis, "input gradient"))
    if isinstance(computation, Contraction) and style.name != "gathered" and not style.given:
        kind = "all_gather" if isinstance(style.input, Shard) else "all_reduce"
        backward.append(Collective(kind, style.axis, "input gradient"))
    whole_bias = "bias" in weights and "bias" not in style.local
    if isinstance(computation, Contraction) and (style.kept or style.open) and whole_bias:
        dim = bias_dim(style, computation, weights["bias"].shape)
        kind = "all_reduce" if dim is None else "all_gather"
        backward.append(Collective(kind, style.axis, "bias gradient"))
    return tuple(forward), tuple(backward)
