"""An APoT variant as an ONNX graph of integer operators that stock onnxruntime runs.

Enters: the integer twin that was attacked. Leaves: a `ModelProto` that computes the same codes,
the names of its quantised tensors, and single layers of it for timing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import onnx
from onnx import TensorProto

from export.graph import GraphBuilder
from export.integer_layers import (
    Features,
    IntegerWriter,
    Kernel,
    as_array,
    convolved,
    same_quantiser,
)
from harness.models.integer import (
    IntegerBlock,
    IntegerResNet,
    RequantisedConv,
    RescaledConv,
)

_LAST_LAYER_BITS = (8, 32)


class Exposed(NamedTuple):
    """Where one quantised layer of the twin is found in the file."""

    module: str
    """Name of the twin's `LevelTable` module."""
    codes: str
    """Tensor of its half-unit counts, uint8."""
    levels: str
    """Tensor of its integer levels, uint8."""


def integer_graph(
    model: IntegerResNet,
    *,
    image_shape: tuple[int, int, int],
    metadata: Mapping[str, str],
    packed: bool = True,
    kernels: Mapping[str, Kernel] | None = None,
) -> onnx.ModelProto:
    """The twin as ONNX.

    Args:
        model: the integer network.
        image_shape: (C, H, W).
        metadata: written into the file.
        packed: store hidden weights several to a code (`export.packing`), else one to a byte.
        kernels: layer name (`blocks.3.conv1`) -> its form; what is not named is `default_form`.

    Raises:
        ValueError: `metadata` uses a reserved key, or the mean is not in whole pixel units.
    """
    mean = as_array(model.mean_255)
    if not np.array_equal(mean, np.rint(mean)):
        raise ValueError(f"an integer stem needs a whole mean, not {mean.flatten().tolist()}")
    graph = GraphBuilder(image_shape)
    writer = IntegerWriter(graph, model.bits, packed=packed, kernels=kernels or {})
    x = Features(graph.centred_image(mean), *image_shape)
    x = writer.stem(model.stem, x)
    for index, block in enumerate(model.blocks()):
        x = writer.block(block, x, f"blocks.{index}")
    weight = graph.node(
        "DequantizeLinear",
        [
            graph.constant("fc.weight.int8", model.fc.levels),
            graph.constant("fc.weight.scale", np.array(model.fc.scale, dtype=np.float32)),
            graph.constant("zero.int8", np.array(0, dtype=np.int8)),
        ],
        "fc.weight",
    )
    graph.classify(x.tensor, weight, as_array(model.fc.bias))
    return graph.finish(
        classes=model.fc.levels.shape[0],
        metadata=metadata,
        nominal_bits={**writer.bits, "fc": _LAST_LAYER_BITS},
    )


def exposed_layers(model: IntegerResNet) -> tuple[Exposed, ...]:
    """Every quantised layer of the twin and its tensors in the graph, from input to output."""
    layers: list[Exposed] = []
    for index, block in enumerate(model.blocks()):
        module, name = f"layers.{index}", f"blocks.{index}"
        layers.append(_exposed(f"{module}.quantise.levels", f"{name}.quantise"))
        layers.append(_exposed(f"{module}.conv1.output.levels", f"{name}.conv1"))
        if block.quantise_shortcut is not None:
            shared = same_quantiser(block.quantise, block.quantise_shortcut)
            tensor = f"{name}.quantise" if shared else f"{name}.quantise_shortcut"
            layers.append(_exposed(f"{module}.quantise_shortcut.levels", tensor))
    return tuple(layers)


class LayerShape(NamedTuple):
    """What decides how fast a hidden convolution is."""

    kind: str
    """requantised (levels to levels) or rescaled (levels to float)."""
    input: tuple[int, int, int]
    """(C, H, W)."""
    outputs: int
    kernel: int
    stride: int

    @property
    def text(self) -> str:
        """For people."""
        size = "x".join(map(str, self.input))
        return f"{size} to {self.outputs}, {self.kernel}x{self.kernel}/{self.stride}"


def layer_shapes(
    model: IntegerResNet, *, image_shape: tuple[int, int, int]
) -> dict[str, LayerShape]:
    """Every hidden convolution by its name in the file."""
    x = convolved("", Features("", *image_shape), model.stem.conv)
    shapes: dict[str, LayerShape] = {}
    for index, block in enumerate(model.blocks()):
        hidden = convolved("", x, block.conv1.conv)
        for name, layer, reads in (
            ("conv1", block.conv1, x),
            ("conv2", block.conv2, hidden),
            ("shortcut", block.shortcut, x),
        ):
            if layer is not None:
                kind = "requantised" if isinstance(layer, RequantisedConv) else "rescaled"
                outputs, _, kernel, _ = layer.conv.weight.shape
                shapes[f"blocks.{index}.{name}"] = LayerShape(
                    kind, reads[1:], outputs, kernel, layer.conv.stride
                )
        x = convolved("", hidden, block.conv2.conv)
    return shapes


def layer_named(model: IntegerResNet, name: str) -> RequantisedConv | RescaledConv:
    """The hidden convolution that the file calls `name` (`blocks.3.conv1`)."""
    layer: RequantisedConv | RescaledConv = getattr(_block_of(model, name), name.split(".")[2])
    return layer


def _block_of(model: IntegerResNet, name: str) -> IntegerBlock:
    return list(model.blocks())[int(name.split(".")[1])]


def layer_graph(
    model: IntegerResNet, name: str, shape: LayerShape, kernel: Kernel
) -> onnx.ModelProto:
    """One hidden convolution alone, after a quantiser, as a model of its own: for timing it."""
    block = _block_of(model, name)
    graph = GraphBuilder(shape.input)
    writer = IntegerWriter(graph, model.bits, packed=False, kernels={name: kernel})
    centred = graph.centred_image(np.zeros((1, 1, 1, 1), dtype=np.float32))
    levels = writer.quantise(block.quantise, Features(centred, *shape.input), "input")
    layer = layer_named(model, name)
    if isinstance(layer, RequantisedConv):
        hidden = writer.as_read_by(writer.requantised(layer, levels, name), kernel)
        output = graph.node("Cast", [hidden], "hidden.float", to=TensorProto.FLOAT)
    else:
        output = writer.rescaled(layer, levels, name).tensor
    weight = graph.constant("fc.weight", np.ones((1, shape.outputs), dtype=np.float32))
    graph.classify(output, weight, np.zeros(1, dtype=np.float32))
    return graph.finish(classes=1, metadata={}, nominal_bits={})


def _exposed(module: str, name: str) -> Exposed:
    return Exposed(module, f"{name}.codes", f"{name}.levels")
