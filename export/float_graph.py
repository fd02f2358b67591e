"""A float variant (full, SFP, PP) as an ONNX graph.

Enters: a `FoldedResNet`, slimmed or not. Leaves: a `ModelProto` of the same function: Conv and
Relu, Gather where a shortcut lost channels, Mul where a mask could not be cut.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from torch import Tensor, nn

from export.graph import Array, GraphBuilder, NominalBits, conv_attributes
from harness.models.folded import FoldedBlock, FoldedResNet

_FLOAT_BITS = (32, 32)


def float_graph(
    model: FoldedResNet, *, image_shape: tuple[int, int, int], metadata: Mapping[str, str]
) -> onnx.ModelProto:
    """The model as ONNX; `image_shape` is (C, H, W).

    Raises:
        ValueError: `metadata` uses a reserved key.
    """
    graph = GraphBuilder(image_shape)
    bits: NominalBits = {"fc": _FLOAT_BITS}
    x = graph.centred_image(_array(model.mean_255))
    x = graph.node("Relu", [_conv(graph, bits, model.stem, x, "stem")], "stem.relu")
    for index, block in enumerate(model.blocks()):
        x = _block(graph, bits, block, x, f"blocks.{index}")
    weight = graph.constant("fc.weight", _array(model.fc.weight))
    graph.classify(x, weight, _array(model.fc.bias))
    return graph.finish(classes=model.fc.out_features, metadata=metadata, nominal_bits=bits)


def exposed_blocks(model: FoldedResNet) -> dict[str, str]:
    """Tensor of the file -> the module of `model` whose output it is, block by block."""
    return {
        f"blocks.{i}.{'relu' if block.mask is None else 'masked'}": f"layers.{i}"
        for i, block in enumerate(model.blocks())
    }


def _block(graph: GraphBuilder, bits: NominalBits, block: FoldedBlock, x: str, name: str) -> str:
    hidden = _conv(graph, bits, block.conv1, x, f"{name}.conv1")
    hidden = graph.node("Relu", [hidden], f"{name}.conv1.relu")
    y = _conv(graph, bits, block.conv2, hidden, f"{name}.conv2")
    skip = x
    if block.shortcut is not None:
        skip = _conv(graph, bits, block.shortcut, x, f"{name}.shortcut")
    elif block.skip_channels is not None:
        channels = graph.constant(f"{name}.skip_channels", _array(block.skip_channels))
        skip = graph.node("Gather", [x, channels], f"{name}.skip", axis=1)
    y = graph.node("Relu", [graph.node("Add", [y, skip], f"{name}.add")], f"{name}.relu")
    if block.mask is None:
        return y
    mask = graph.constant(f"{name}.mask", _array(block.mask))
    return graph.node("Mul", [y, mask], f"{name}.masked")


def _conv(graph: GraphBuilder, bits: NominalBits, conv: nn.Conv2d, x: str, name: str) -> str:
    assert conv.bias is not None
    assert not isinstance(conv.padding, str)
    bits[name] = _FLOAT_BITS
    weight = graph.constant(f"{name}.weight", _array(conv.weight))
    bias = graph.constant(f"{name}.bias", _array(conv.bias))
    shape = conv_attributes(
        kernel=conv.kernel_size[0], stride=conv.stride[0], padding=conv.padding[0]
    )
    return graph.node("Conv", [x, weight, bias], name, **shape)


def _array(tensor: Tensor) -> Array:
    array: Array = tensor.detach().cpu().contiguous().numpy()
    return array
