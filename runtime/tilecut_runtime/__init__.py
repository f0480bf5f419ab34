"""tilecut_runtime: what runs with an artifact. numpy and onnxruntime suffice; torch only where an op or target needs it."""
