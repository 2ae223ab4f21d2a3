"""From ONNX graphs to TensorRT engines."""
