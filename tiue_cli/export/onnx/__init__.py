"""From a student to ONNX graphs."""
