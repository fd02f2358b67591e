"""From a trained variant to an ONNX file that is provably the same function."""
