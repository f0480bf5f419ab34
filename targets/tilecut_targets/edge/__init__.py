"""The edge target: ONNX for onnxruntime on a CPU."""
