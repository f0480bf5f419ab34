"""Triton's interpreter multiplies the bit patterns of bfloat16 in `tl.dot`; here it multiplies their values.

Everything else that the kernels do with bfloat16 is to load, cast and store it, which the interpreter does right.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def repair_dot() -> None:
    """Let `tl.dot` of this process's interpreter read bfloat16 operands as float32."""
    dot = interpreter.InterpreterBuilder.create_dot

    def as_float32(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return dot(self, as_float32(a), as_float32(b), *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot  # type: ignore[method-assign]
