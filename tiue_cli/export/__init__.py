"""A student as ONNX graphs and TensorRT plans. Imports nothing: the manifests are read without torch."""
