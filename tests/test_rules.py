"""What each layer type can compute on shards."""

from __future__ import annotations

from typing import Any

import keras
import pytest
from keras import layers
from torch.distributed.tensor import Partial, Replicate, Shard

from keras_tp.computations import Contraction
from keras_tp.rules import Weight, collectives_of, computation_of, style_along


def built(layer: Any, *shape: int | None) -> Any:
    layer.build((None, *shape))
    return layer


def test_dense_is_a_contraction_of_the_last_dim() -> None:
    found, _ = computation_of(built(layers.Dense(4), 3))
    assert found == Contraction("...x", "xy", "...y", "y", "", ("kernel", "bias"))
    found, _ = computation_of(built(layers.Dense(4, use_bias=False), 3))
    assert found == Contraction("...x", "xy", "...y", "", "", ("kernel",))


@pytest.mark.parametrize(
    ("equation", "output", "bias_axes", "shape", "expected"),
    [
        ("abc,cde->abde", (None, 2, 4), "de", (5, 3), ("abc", "cde", "abde", "de")),
        ("abcd,cde->abe", (None, 4), "e", (5, 2, 3), ("abcd", "cde", "abe", "e")),
        ("...x,xy->...y", 4, "y", (5, 3), ("...x", "xy", "...y", "y")),
        ("ab...,bc->ac...", (4,), None, (3, 6, 7), ("ab...", "bc", "ac...", "")),
        ("abc,bcd->abd", (5, 4), "bd", (5, 3), ("abc", "bcd", "abd", "bd")),
        ("ab,bc->ac", (4,), None, (3,), ("ab", "bc", "ac", "")),
        ("abc,cd->abd", (5, 4), "b", (5, 3), ("abc", "cd", "abd", "bd")),
    ],
)
def test_einsum_equations_are_read(
    equation: str, output: Any, bias_axes: Any, shape: Any, expected: tuple[str, ...]
) -> None:
    """A bias label read off `bias_axes` alone misses the dims of size 1 between and after."""
    layer = built(layers.EinsumDense(equation, output, bias_axes=bias_axes), *shape)
    found, reason = computation_of(layer)
    assert isinstance(found, Contraction), reason
    assert (found.input, found.kernel, found.output, found.bias) == expected
    assert len(found.kernel) == len(layer.kernel.shape)
    assert layer.bias is None or len(found.bias) == len(layer.bias.shape)


class OwnDense(layers.Dense):
    def call(self, inputs: Any, training: Any = None) -> Any:
        return super().call(inputs) * 2


class OwnEmbedding(layers.Embedding):
    def call(self, inputs: Any) -> Any:
        return super().call(inputs) * 2


class OwnKernel(layers.Dense):
    @property
    def kernel(self) -> Any:
        return super().kernel


def test_changed_computations_have_no_rule() -> None:
    """A rule that goes by isinstance computes what the subclass no longer does."""
    for layer, word in (
        (built(OwnDense(2), 3), "overrides Dense.call"),
        (built(OwnKernel(2), 3), "overrides Dense.kernel"),
        (built(OwnEmbedding(5, 2)), "overrides Embedding.call"),
        (built(layers.LayerNormalization(), 3), "no rule computes LayerNormalization"),
    ):
        found, reason = computation_of(layer)
        assert found is None
        assert word in reason


def test_lora_and_instance_calls_have_no_rule() -> None:
    """LoRA changes what `kernel` returns without changing the class."""
    lora = built(layers.Dense(2), 3)
    lora.enable_lora(1)
    assert computation_of(lora) == (None, "LoRA adds to the weight")
    patched = built(layers.Dense(2), 3)
    patched.call = lambda x: x
    assert computation_of(patched)[0] is None


QKV = Contraction("abc", "cde", "abde", "de", "abc,cde->abde", ("kernel", "bias"))
EXPERTS = Contraction("aec", "ecd", "aed", "ed", "aec,ecd->aed", ("kernel", "bias"))


@pytest.mark.parametrize(
    ("contraction", "kernel", "bias", "name", "input_", "output", "local"),
    [
        (QKV, (None, "m", None), ("m", None), "column", Replicate(), Shard(2), 2),
        (QKV, (None, "m", None), (None, None), "column", Replicate(), Shard(2), 1),
        (QKV, (None, None, "m"), ("m", None), "column", Replicate(), Shard(3), 1),
        (QKV, ("m", None, None), (None, None), "row", Shard(2), Partial(), 1),
        (QKV, (None, None, None), ("m", None), "gathered", Replicate(), Replicate(), 0),
        (EXPERTS, ("m", None, None), ("m", None), "batched", Shard(1), Shard(1), 2),
    ],
)
def test_styles_of_a_contraction(
    contraction: Contraction,
    kernel: Any,
    bias: Any,
    name: str,
    input_: Any,
    output: Any,
    local: int,
) -> None:
    """A kernel dim taken for another label computes something else of the same shape."""
    sizes = dict(zip(contraction.kernel, (8, 6, 4), strict=True))
    weights = {
        "kernel": Weight((8, 6, 4), kernel),
        "bias": Weight(tuple(sizes[label] for label in contraction.bias), bias),
    }
    style = style_along("m", contraction, weights)
    assert style is not None
    assert (style.name, style.input, style.output) == (name, input_, output)
    assert len(style.local) == local


def test_no_style_where_nothing_is_sharded() -> None:
    weights = {
        "kernel": Weight((8, 6, 4), ("other", None, None)),
        "bias": Weight((6, 4), (None,) * 2),
    }
    assert style_along("m", QKV, weights) is None


def test_collectives_of_each_style() -> None:
    """The table of costs that the plan prints."""

    def cost(kernel: Any, bias: Any) -> Any:
        weights = {"kernel": Weight((8, 6, 4), kernel), "bias": Weight((6, 4), bias)}
        style = style_along("m", QKV, weights)
        assert style is not None
        return tuple(list(map(str, side)) for side in collectives_of(style, QKV, weights))

    none, heads = (None, None), ("m", None)
    assert cost((None, "m", None), heads) == (
        ["all_gather output"],
        ["all_reduce input gradient"],
    )
    assert cost(("m", None, None), none) == (
        ["all_reduce output"],
        ["all_gather input gradient"],
    )
    assert cost(("m", None, None), heads) == (
        ["all_gather bias", "all_reduce output"],
        ["all_gather input gradient"],
    )
    assert cost((None, None, None), heads) == (["all_gather bias"], [])


def test_keras_attention_is_made_of_rules() -> None:
    """MultiHeadAttention and GroupedQueryAttention shard through their projections."""
    x = keras.Input((5, 8))
    for attention in (
        layers.MultiHeadAttention(2, 4),
        layers.GroupQueryAttention(4, 4, 2),
    ):
        attention(x, x)
        for part in (attention._query_dense, attention._key_dense, attention._output_dense):
            assert isinstance(computation_of(part)[0], Contraction)


def test_a_bias_of_size_one_is_not_cut_with_the_output() -> None:
    """It stands under the sharded label and is broadcast over it; one rank had none of it."""
    layer = built(layers.EinsumDense("abc,cd->abd", (5, 6), bias_axes="b"), 5, 4)
    computation, _ = computation_of(layer)
    weights = {
        "kernel": Weight((4, 6), (None, "model")),
        "bias": Weight((5, 1), (None, "model")),
    }
    style = style_along("model", computation, weights)
    assert style is not None
    assert (style.name, style.local) == ("column", ("kernel",))
    forward, _ = collectives_of(style, computation, weights)
    assert sorted(map(str, forward)) == ["all_gather bias", "all_gather output"]
