"""Run an edge artifact with tilecut's runtime, or with nothing but onnxruntime. Neither imports torch.

Run it:  python examples/run_without_torch.py ARTIFACT
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime

from tilecut import load

if __name__ == "__main__":
    artifact = Path(sys.argv[1])

    session = load(artifact, threads=1)
    print(session)
    # A tokenizer's work: two texts, the shorter one padded.
    ids = np.array([[10, 47, 89, 11, 0], [10, 47, 21, 89, 11]], dtype=np.int64)
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int64), "token_type_ids": np.zeros_like(ids)}
    with_tilecut = session.run(inputs)
    print({name: (value.dtype.name, value.shape) for name, value in with_tilecut.items()})

    plain = onnxruntime.InferenceSession(artifact / "model.onnx", providers=["CPUExecutionProvider"])
    for spec, value in zip(plain.get_outputs(), plain.run(None, inputs), strict=True):
        print(f"{spec.name}: largest difference {np.abs(value - with_tilecut[spec.name]).max()}")
    assert "torch" not in sys.modules
