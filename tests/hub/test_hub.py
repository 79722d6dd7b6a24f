"""KerasHub's models with the layout maps it ships for them: the numbers of one process.

`make test-hub` runs this; the other tests neither need KerasHub nor know of it.

The maps are used as they come, the contracted dims of attention that they cut included (keras-hub
#2827). With `_Copy.backward` in keras_tp/collectives.py not reducing, every test of numbers fails.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import keras
import numpy as np
import parity
import pytest
from keras_hub import models

import keras_tp

# 31 ids are not shared evenly by two ranks.
VOCABULARY, WIDTH, TOKENS = 31, 16, 6
SMALL = {
    "vocabulary_size": VOCABULARY,
    "num_layers": 2,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": WIDTH,
    "intermediate_dim": 24,
}
TIED = {**SMALL, "tie_word_embeddings": True}
UNTIED = {**SMALL, "tie_word_embeddings": False}
GEMMA = {**SMALL, "head_dim": 4}
GEMMA2 = {
    **GEMMA,
    "use_post_ffw_norm": True,
    "use_post_attention_norm": True,
    "attention_logit_soft_cap": 5.0,
    "final_logit_soft_cap": 3.0,
    "use_sliding_window_attention": True,
    "sliding_window_size": 3,
}
EXPERTS = {"num_experts": 4, "top_k": 2, "moe_intermediate_dim": 12}
SHARED_EXPERT = {**EXPERTS, "shared_expert_intermediate_dim": 20}
NORMALIZED = {**EXPERTS, "head_dim": 4, "norm_top_k_prob": True}

# Backbone, its configuration, the model that makes logits of it, how many variables are sharded.
# (Untied weights for logits have no gradient in a backbone alone.)
CASES: dict[str, tuple[Any, dict[str, Any], Any, int]] = {
    "llama": (models.LlamaBackbone, TIED, None, 15),
    "llama tied": (models.LlamaBackbone, TIED, models.LlamaCausalLM, 15),
    "llama untied": (models.LlamaBackbone, UNTIED, models.LlamaCausalLM, 15),
    "llama one kv head": (
        models.LlamaBackbone,
        {**UNTIED, "num_key_value_heads": 1},
        models.LlamaCausalLM,
        15,
    ),
    "gemma": (models.GemmaBackbone, GEMMA, None, 15),
    "gemma tied": (models.GemmaBackbone, GEMMA, models.GemmaCausalLM, 15),
    "gemma2 tied": (models.GemmaBackbone, GEMMA2, models.GemmaCausalLM, 15),
    "qwen": (models.QwenBackbone, TIED, None, 15),
    "qwen untied": (models.QwenBackbone, UNTIED, models.QwenCausalLM, 15),
    "qwen moe": (models.QwenMoeBackbone, {**TIED, **SHARED_EXPERT}, None, 17),
    "qwen moe untied": (
        models.QwenMoeBackbone,
        {**UNTIED, **SHARED_EXPERT},
        models.QwenMoeCausalLM,
        17,
    ),
    "qwen3 moe": (models.Qwen3MoeBackbone, {**TIED, **NORMALIZED}, None, 11),
    "qwen3 moe untied": (
        models.Qwen3MoeBackbone,
        {**UNTIED, **NORMALIZED},
        models.Qwen3MoeCausalLM,
        11,
    ),
    "qwen3 moe one dense layer": (
        models.Qwen3MoeBackbone,
        {**TIED, **NORMALIZED, "mlp_only_layers": [0]},
        models.Qwen3MoeCausalLM,
        13,
    ),
}
MESHES = {2: {"batch": 1, "model": 2}, 4: {"batch": 2, "model": 2}}
ADAM = {"class_name": "Adam", "config": {"learning_rate": 1e-3}}
CROSSENTROPY = {"class_name": "SparseCategoricalCrossentropy", "config": {"from_logits": True}}


def build(name: str) -> Any:
    kind, config, with_logits, _ = CASES[name]
    backbone = kind(**config)
    return with_logits(backbone=backbone, preprocessor=None) if with_logits else backbone


def data(name: str) -> tuple[dict[str, Any], Any]:
    """Ids, most rows padded behind; the ids that come next, or any hidden states."""
    random = np.random.default_rng(5)
    ids = random.integers(0, VOCABULARY, (4, TOKENS + 1))
    lengths = np.array([[TOKENS], [4], [1], [5]])
    inputs = {
        "token_ids": ids[:, :-1].astype("int32"),
        "padding_mask": (np.arange(TOKENS) < lengths).astype("int32"),
    }
    if CASES[name][2] is not None:
        return inputs, ids[:, 1:].astype("int64")
    return inputs, random.standard_normal((4, TOKENS, WIDTH))


@contextlib.contextmanager
def casts_to_float64() -> Iterator[None]:
    """Makes KerasHub's casts to float32 casts to float64, the dtype of the rest of the model.

    Whatever the model's dtype, its norms and gates go through `ops.cast(x, "float32")`
    (llama_layernorm.py, llama_decoder.py, and so on; gemma's rms_normalization.py). Most
    differences of 1e-16 vanish there and a few become 1e-7. Angles of rotary embeddings stay
    float32: they depend on positions alone.
    """
    cast = keras.ops.cast
    with mock.patch.object(
        keras.ops, "cast", lambda x, dtype: cast(x, "float64" if dtype == "float32" else dtype)
    ):
        yield


def build_float64(name: str) -> Any:
    """As `build`; attention's softmax, made with dtype "float32", is float64 too."""
    model = build(name)
    for layer in model._flatten_layers():
        if layer.compute_dtype == "float32":
            layer.dtype_policy = "float64"
    return model


def ignore_unused_patterns() -> None:
    """A model of experts alone has no MLP for the map's patterns, which keras_tp says."""
    warnings.filterwarnings("ignore", "pattern .* matches no", keras_tp.LayoutWarning)


def train(name: str, size: int, float64: bool) -> parity.Report:
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        if "qwen3 moe" in name:
            ignore_unused_patterns()
        if "moe" in name and size == 4:  # two replicas: how experts are balanced is of all rows
            warnings.filterwarnings("ignore", "in training, .*moe_block", keras_tp.LayoutWarning)
        if float64:
            stack.enter_context(casts_to_float64())
        return parity.compare(
            lambda: build_float64(name) if float64 else build(name),
            CASES[name][0].get_layout_map,
            MESHES[size],
            data(name),
            optimizer=ADAM if float64 else None,
            loss="mse" if CASES[name][2] is None else CROSSENTROPY,
            float64=float64,
        )


# What runs besides on two ranks in float64, as all do: on four, and as the models come. (All of
# it takes minutes: `make test-slow`.)
FOUR = ("llama untied", "llama one kv head", "gemma2 tied", "qwen moe untied")
FLOAT32 = ("llama untied", "gemma2 tied", "qwen3 moe untied")


def runs() -> Iterator[Any]:
    for name in CASES:
        yield pytest.param(name, 2, True, 1e-10)
        slow = [] if name in FOUR else [pytest.mark.slow]
        yield pytest.param(name, 4, True, 1e-10, marks=slow)
        slow = [] if name in FLOAT32 else [pytest.mark.slow]
        yield pytest.param(name, 2, False, 5e-5, marks=slow)


@pytest.mark.parametrize(("name", "size", "float64", "allowed"), list(runs()))
def test_numbers_of_one_process(
    ranks: Any, name: str, size: int, float64: bool, allowed: float
) -> None:
    """A layer that KerasHub calls in a way that Keras's own do not, a weight read past its layer,
    a token sent to other experts, an auxiliary loss counted per rank: each shows.

    In float64 the models are without their casts, in float32 as they come. There the gradients of
    one process are themselves up to 6e-6 from those in float64 (measured by hand, a query kernel of
    "qwen3 moe untied"), so that two right programs may differ by twice that.
    """
    for report in ranks(size)(train, name, size, float64):
        assert report.sharded == CASES[name][3]
        assert report.worst() < allowed, report


def generate(name: str, size: int) -> tuple[Any, Any]:
    kind, *_ = CASES[name]
    prompt = data(name)[0]
    texts = []
    for parallel in (False, True):
        model = parity.build_seeded(lambda: build(name))
        if parallel:
            layout_map = kind.get_layout_map(keras_tp.device_mesh(MESHES[size]))
            keras_tp.parallelize(model, plan=parity.planned(model, layout_map))
        model.compile(sampler="greedy")
        with warnings.catch_warnings():
            # A cache has all heads, so that attention on it gathers, and says so.
            warnings.filterwarnings("ignore", ".*planned to stay sharded", keras_tp.LayoutWarning)
            texts.append(model.generate(prompt, stop_token_ids=None)["token_ids"])
    return texts[0], texts[1]


@pytest.mark.parametrize("name", ["llama untied", "gemma tied", "qwen moe untied"])
def test_generated_text(ranks: Any, name: str) -> None:
    """Decoding calls the layers past `Model.__call__`, on caches, without gradients."""
    for one, many in ranks(2)(generate, name, 2):
        np.testing.assert_array_equal(one, many)
        assert (one != data(name)[0]["token_ids"]).any()


def verified(name: str, size: int) -> Any:
    model = parity.build_seeded(lambda: build(name))
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        ignore_unused_patterns()
        layout_map = CASES[name][0].get_layout_map(keras_tp.device_mesh(MESHES[size]))
        keras_tp.parallelize(model, plan=parity.planned(model, layout_map))
    return keras_tp.verify(model, data(name))


@pytest.mark.parametrize("name", ["llama one kv head", "gemma tied", "qwen moe untied"])
def test_verification(ranks: Any, name: str) -> None:
    """What users reach for first must not cry wolf: layers in layers, masks, caches, experts."""
    first, *others = ranks(4)(verified, name, 4)
    assert first.equal, str(first)
    assert all(other == first for other in others)
    assert len(first.layers) > 10
    assert first.not_called == ()


def loaded() -> tuple[bool, bool]:
    return "keras_hub" in sys.modules, "tensorflow" in sys.modules


def test_no_tensorflow(ranks: Any) -> None:
    """KerasHub without TensorFlow is what is installed and meant."""
    assert [loaded(), *ranks(2)(loaded)] == [(True, False)] * 3


def llama_layers(size: int) -> dict[str, str]:
    layout_map = models.LlamaBackbone.get_layout_map(keras_tp.device_mesh(MESHES[size]))
    plan = keras_tp.plan(build("llama untied"), layout_map)
    return {layer.path.replace("transformer_layer_", ""): layer.style for layer in plan.layers}


def test_plan_of_llama() -> None:
    """What the map means is easily taken for Megatron's layout; on one axis q, k, v are rows."""
    one_axis, two_axes = llama_layers(2), llama_layers(4)
    for block in "01":
        for name in ("query", "key", "value"):
            assert one_axis[f"{block}/self_attention/{name}"] == "row"
            assert two_axes[f"{block}/self_attention/{name}"] == "gathered + row"
        assert one_axis[f"{block}/self_attention/attention_output"] == "row"
        for name in ("intermediate", "gate"):
            assert one_axis[f"{block}/feedforward_{name}_dense"] == "column"
            assert two_axes[f"{block}/feedforward_{name}_dense"] == "gathered + column"
        assert one_axis[f"{block}/feedforward_output_dense"] == "row"
        assert one_axis[f"{block}/feedforward_layernorm"] == "replicated"
    assert one_axis["token_embedding"] == "vocabulary"


def test_what_the_maps_leave_whole() -> None:
    """The maps have no pattern for untied logits, nor for experts, which are most of such a model;
    two patterns of theirs find nothing where every layer has experts."""
    kind, config, *_ = CASES["qwen3 moe untied"]
    layout_map = kind.get_layout_map(keras_tp.device_mesh(MESHES[2]))
    with pytest.warns(keras_tp.LayoutWarning, match="matches no") as caught:
        plan = keras_tp.plan(kind(**config), layout_map)
    assert len(caught) == 2
    whole = {v.path.split("/")[-1] for v in plan.variables if len(v.shape) > 1 and not v.sharded}
    assert whole == {
        "reverse_embeddings",
        "expert_feedforward_gate_dense",
        "expert_feedforward_output_dense",
    }
