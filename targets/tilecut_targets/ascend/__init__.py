"""The ascend target: ONNX for CANN's ATC with fused attention, and a twin of it that onnxruntime runs."""
