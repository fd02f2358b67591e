"""Timing of single layers: every layer is covered, alone it computes what it does in the model."""

from __future__ import annotations

import numpy as np
import pytest
from export_cases import IMAGE_SHAPE, twin

from export.graph import serialise
from export.integer_graph import layer_graph, layer_named, layer_shapes
from export.integer_layers import default_form, forms_of
from export.runtime import RunSettings, open_session, run
from export.tuning import fastest, tune


def test_layers_and_shapes_by_hand() -> None:
    """Width 4, 16 x 16 images: stages of 4, 8, 16, 32 channels."""
    shapes = layer_shapes(twin(3), image_shape=IMAGE_SHAPE)
    assert len(shapes) == 8 + 8 + 3
    assert shapes["blocks.0.conv1"] == ("requantised", (4, 16, 16), 4, 3, 1)
    assert shapes["blocks.2.conv1"] == ("requantised", (4, 16, 16), 8, 3, 2)
    assert shapes["blocks.2.shortcut"] == ("rescaled", (4, 16, 16), 8, 1, 2)
    assert shapes["blocks.7.conv2"] == ("rescaled", (32, 2, 2), 32, 3, 1)
    assert shapes["blocks.2.conv1"].text == "4x16x16 to 8, 3x3/2"


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_form_of_a_layer_alone_give_the_same_numbers(bits: int) -> None:
    model = twin(bits)
    for name, shape in layer_shapes(model, image_shape=IMAGE_SHAPE).items():
        pixels = np.random.default_rng(1).integers(0, 256, (3, *shape.input), dtype=np.uint8)
        forms = forms_of(layer_named(model, name))
        assert ("matmul" in forms) == (shape.kind == "rescaled")
        one, *others = (
            run(open_session(serialise(layer_graph(model, name, shape, kernel))), pixels)
            for kernel in forms
        )
        for other in others:
            np.testing.assert_array_equal(one, other)
        assert np.abs(one).max() > 0


def test_tuning_times_every_layer_and_each_shape_once() -> None:
    model, told = twin(2), list[str]()
    timings = tune(
        model, image_shape=IMAGE_SHAPE, runs=2, progress=lambda _fraction, note: told.append(note)
    )
    shapes = layer_shapes(model, image_shape=IMAGE_SHAPE)
    assert timings.keys() == shapes.keys()
    assert timings["blocks.0.conv1"].keys() == {"integer", "float"}
    assert timings["blocks.0.conv2"].keys() == {"integer", "matmul", "float"}
    assert all(ns > 0 for times in timings.values() for ns in times.values())
    assert len(told) == len(set(shapes.values())) < len(shapes)
    assert timings["blocks.0.conv1"] == timings["blocks.1.conv1"]


def test_the_fastest_form_is_taken() -> None:
    assert fastest({"integer": 10, "float": 9}) == "float"
    assert fastest({"integer": 9, "matmul": 8, "float": 10}) == "matmul"
    assert fastest({"integer": 9, "matmul": 9, "float": 9}) == "integer"


def test_unmeasured_only_wide_layers_become_products() -> None:
    """Stages of 4, 8, 16, 32 channels: the last has the only inputs of 32."""
    model = twin(2)
    shapes = layer_shapes(model, image_shape=IMAGE_SHAPE)
    products = {n for n in shapes if default_form(layer_named(model, n)) == "matmul"}
    assert products == {"blocks.6.conv2", "blocks.7.conv2"}


def test_a_session_of_one_layer_takes_any_batch() -> None:
    model = twin(4)
    shape = layer_shapes(model, image_shape=IMAGE_SHAPE)["blocks.0.conv2"]
    session = open_session(serialise(layer_graph(model, "blocks.0.conv2", shape, "integer")))
    for n in (1, 5):
        pixels = np.zeros((n, *shape.input), dtype=np.uint8)
        assert run(session, pixels, RunSettings(batch_size=n)).shape == (n, 1)
