"""Makes TRITON_INTERPRET=1 tell the truth about bf16, which the interpreter holds as 16-bit integers.

A product would be taken of the raw bits and a cast would truncate. With this repair casts round to nearest and arithmetic on
bf16 is an error; kernels widen what they load anyway. Import it before any kernel runs.
"""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def is_bf16(handle):
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16


def rounded(values):
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    nearest = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)


def repair():
    cast = InterpreterBuilder.cast_impl

    def repaired_cast(self, source, target):
        if target.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32:
            return TensorHandle(rounded(source.data), tl.bfloat16)
        if is_bf16(source) and target.scalar == tl.float32:
            return TensorHandle((source.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        if is_bf16(source) or target.scalar == tl.bfloat16:
            raise TypeError(f"interpreter: cast {source.dtype} to fp32 first, then to {target}")
        return cast(self, source, target)

    InterpreterBuilder.cast_impl = repaired_cast
    for name in ("binary_op", "unary_op", "create_dot"):
        setattr(InterpreterBuilder, name, refuse_bf16(getattr(InterpreterBuilder, name)))


def refuse_bf16(operation):
    def guarded(self, *args):
        if any(is_bf16(a) for a in args):
            raise TypeError("interpreter: arithmetic on bf16; widen what is loaded")
        return operation(self, *args)

    return guarded
