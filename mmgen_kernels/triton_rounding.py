"""Numbers in Triton kernels of all families: widened to the dtype of the computation, rounded back once, divided as on a CPU."""

import triton
import triton.language as tl


@triton.jit
def widen(values, WIDE: tl.constexpr):
    """fp32, or fp64 by way of fp32, as the interpreter would take the bits of a bf16 for an integer."""
    if values.dtype == tl.float64:
        return values if WIDE else values.to(tl.float32)
    return values.to(tl.float32).to(tl.float64) if WIDE else values.to(tl.float32)


@triton.jit
def narrow(values, like):
    """As stored at `like`: half precision by way of fp32, as torch does it."""
    if like.dtype.element_ty == tl.float64:
        return values.to(tl.float64)
    return values.to(tl.float32).to(like.dtype.element_ty)


@triton.jit
def divide(a, b):
    """Rounded once; fp32's `/` is not on a GPU."""
    return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def reciprocal_root(values):
    if values.dtype == tl.float64:
        return 1.0 / tl.sqrt(values)
    return tl.div_rn(values * 0.0 + 1.0, tl.sqrt_rn(values))
