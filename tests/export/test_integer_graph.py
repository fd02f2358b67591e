from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from export_cases import IMAGE_SHAPE, images, logits, relative_error, spec, trained, twin
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from export.cost import cost_card
from export.graph import serialise
from export.integer_graph import exposed_layers, integer_graph
from export.integer_layers import Kernel
from export.runtime import RunSettings, open_session, run
from export.verify import verify_integer
from harness.models.integer import IntegerResNet, LevelTable
from harness.models.integerise import integerise
from harness.models.resnet import build_model

BITS = (2, 3, 4)
PIXELS = images(65, seed=7)


def built(model: IntegerResNet) -> onnx.ModelProto:
    return integer_graph(model, image_shape=IMAGE_SHAPE, metadata={"variant": "q"})


@pytest.mark.parametrize("awkward", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_codes_are_the_twins_bit_for_bit(bits: int, awkward: bool) -> None:
    model = twin(bits, awkward=awkward)
    content = serialise(built(model))
    for how in (
        RunSettings(threads=2, optimise=True, batch_size=64),
        RunSettings(threads=1, optimise=False, batch_size=64),
    ):
        agreement = verify_integer(content, model, PIXELS, settings=[how])
        assert agreement.passed, agreement.reason
        assert agreement.code_mismatches == 0
        assert agreement.argmax_agreement == 1.0
        # 8 blocks, a quantiser before each convolution: 19 layers, codes and levels of each.
        assert agreement.codes_compared is not None
        assert agreement.codes_compared > 65 * 19 * 2 * 16


@pytest.mark.parametrize(
    "how",
    [
        RunSettings(threads=1, optimise=True, batch_size=1),
        RunSettings(threads=2, optimise=False, batch_size=1),
    ],
)
def test_codes_do_not_depend_on_the_batch(how: RunSettings) -> None:
    model = twin(4, awkward=True)
    agreement = verify_integer(serialise(built(model)), model, PIXELS[:12], settings=[how])
    assert agreement.passed, agreement.reason


def test_quantised_layers_are_not_all_zero_or_saturated() -> None:
    """Else the comparison of codes would compare nothing."""
    model = twin(4)
    seen: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, LevelTable):
            module.register_forward_hook(
                lambda _m, _i, out, name=name: seen.update({name: len(out.unique())})
            )
    logits(model, PIXELS)
    assert sorted(seen) == sorted(layer.module for layer in exposed_layers(model))
    assert min(seen.values()) >= 4


@pytest.mark.parametrize("bits", BITS)
def test_one_different_weight_level_is_seen(bits: int) -> None:
    model = twin(bits)
    other = copy.deepcopy(model)
    next(iter(other.blocks())).conv1.conv.weight[0, 0, 1, 1] += 1
    agreement = verify_integer(serialise(built(other)), model, PIXELS)
    assert not agreement.passed
    assert agreement.code_mismatches
    assert "from blocks.0.conv1.codes" in agreement.reason


def test_a_wrong_table_is_seen_even_in_the_last_layer() -> None:
    model = twin(4)
    graph = built(model)
    (table,) = (entry for entry in graph.graph.initializer if entry.name == "levels.4bit.uint8")
    levels = numpy_helper.to_array(table).copy()
    levels[np.searchsorted(levels, 9)] = 8  # the cell just above a midpoint rounds down
    table.CopyFrom(numpy_helper.from_array(levels, table.name))
    assert not verify_integer(serialise(graph), model, PIXELS).passed


def test_operators_are_explicit_integers() -> None:
    graph = integer_graph(twin(4), image_shape=IMAGE_SHAPE, metadata={}, packed=False)
    counts = Counter(node.op_type for node in graph.graph.node)
    assert counts["QLinearConv"] == 8
    assert counts["ConvInteger"] == 6 + 3
    assert counts["MatMulInteger"] == 2  # the last stage's second convolutions: 32 inputs
    assert counts["Conv"] == 1  # the stem, over whole numbers
    assert counts["DequantizeLinear"] == 1  # the last layer's weights
    assert counts["QuantizeLinear"] == 8 + 3
    assert counts["GatherElements"] == 8 + 8 + 3


def test_no_weight_takes_more_than_eight_bits_and_tables_are_stored_once() -> None:
    graph = built(twin(3)).graph
    for tensor in graph.initializer:
        value = numpy_helper.to_array(tensor)
        assert tensor.HasField("raw_data")
        if value.squeeze().ndim > 1:
            assert value.dtype.itemsize == 1, tensor.name
    tables = [t.name for t in graph.initializer if t.data_type == 2 and list(t.dims) == [256]]
    assert tables == ["levels.3bit.uint8"]


def test_a_shortcut_with_the_same_clip_shares_its_quantiser() -> None:
    model = trained(bits=4, width=4)
    alphas = {id(conv): conv.activation_alpha for conv in model.modules() if hasattr(conv, "bits")}
    for alpha in alphas.values():
        alpha.fill_(3.0)
    shared = integerise(model)
    graph = built(shared)
    assert not [node.name for node in graph.graph.node if "quantise_shortcut" in node.name]
    agreement = verify_integer(serialise(graph), shared, PIXELS)
    assert agreement.passed, agreement.reason


def test_batch_is_dynamic_and_logits_are_close_to_the_twins() -> None:
    model = twin(2)
    session = open_session(serialise(built(model)))
    for n in (1, 3, 65):
        actual = run(session, PIXELS[:n], RunSettings(batch_size=n))
        assert actual.shape == (n, 10)
        assert relative_error(actual, logits(model, PIXELS[:n])) < 1e-5


def test_codes_agree_on_extreme_images() -> None:
    rng = np.random.default_rng(0)
    extremes = np.concatenate(
        [
            np.zeros((1, *IMAGE_SHAPE)),
            np.full((1, *IMAGE_SHAPE), 255),
            rng.integers(0, 2, (6, *IMAGE_SHAPE)) * 255,
        ]
    ).astype(np.uint8)
    for bits in BITS:
        model = twin(bits)
        assert verify_integer(serialise(built(model)), model, extremes).code_mismatches == 0


def test_a_fractional_mean_is_refused() -> None:
    model = twin(4)
    model.mean_255 = torch.full((1, 3, 1, 1), 120.5)
    with pytest.raises(ValueError, match="whole mean"):
        built(model)


def every_layer() -> list[str]:
    shortcuts = (2, 4, 6)
    names = [f"blocks.{i}.{conv}" for i in range(8) for conv in ("conv1", "conv2")]
    return names + [f"blocks.{i}.shortcut" for i in shortcuts]


def chosen_forms() -> st.SearchStrategy[dict[str, str]]:
    products = [name for name in every_layer() if not name.endswith("conv1")]
    anywhere = st.dictionaries(
        st.sampled_from(every_layer()), st.sampled_from(["integer", "float"])
    )
    return st.builds(
        lambda some, more: {**some, **dict.fromkeys(more, "matmul")},
        anywhere,
        st.sets(st.sampled_from(products)),
    )


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(BITS), chosen_forms(), st.booleans())
def test_any_choice_of_kernels_gives_the_twins_codes(
    bits: int, kernels: dict[str, Kernel], optimise: bool
) -> None:
    """Onnxruntime fuses a convolution with what follows; the sums must stay whole all the same."""
    model = twin(bits, awkward=True)
    graph = integer_graph(model, image_shape=IMAGE_SHAPE, metadata={}, kernels=kernels)
    counts = Counter(node.op_type for node in graph.graph.node)
    forms = Counter(kernels.values())
    assert counts["Conv"] == 1 + forms["float"]
    unnamed = {"blocks.6.conv2", "blocks.7.conv2"} - kernels.keys()
    assert counts["MatMulInteger"] == forms["matmul"] + len(unnamed)
    agreement = verify_integer(
        serialise(graph), model, PIXELS[:16], settings=[RunSettings(optimise=optimise)]
    )
    assert agreement.passed, agreement.reason


@pytest.mark.parametrize(("bits", "megabytes"), [(2, 2.4), (3, 4.8), (4, 5.8)])
def test_width_64_is_packed_below_its_bits(bits: int, megabytes: float) -> None:
    model = integerise(build_model(spec(width=64, bits=bits), seed=0).eval())
    content = serialise(integer_graph(model, image_shape=(3, 32, 32), metadata={}))
    assert len(content) <= megabytes * 1e6
    card = cost_card(content, image_shape=(3, 32, 32))
    assert card.opset == 13
    assert card.macs == 555_422_720
    # Weights, and a scale and a shift a channel: as many as the trained model's, less its clips.
    assert card.params == 11_173_962
    stem, last = 27 * 64 * 32 * 32, 512 * 10
    hidden = card.macs - stem - last
    assert card.bops_nominal == hidden * bits**2 + stem * 8 * 8 + last * 8 * 32
    assert card.bops_executed == hidden * 8 * 8 + (stem + last) * 32 * 32


def test_width_64_unpacked_takes_one_byte_a_weight() -> None:
    model = integerise(build_model(spec(width=64, bits=4), seed=0).eval())
    graph = integer_graph(model, image_shape=(3, 32, 32), metadata={}, packed=False)
    assert 11.1e6 < len(serialise(graph)) <= 11.5e6
