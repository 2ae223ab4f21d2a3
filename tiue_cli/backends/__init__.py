"""The same pass on torch, ONNX Runtime and TensorRT."""
