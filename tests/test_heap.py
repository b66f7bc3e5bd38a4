"""What calls of C++ kernels leave on the heap: a process that trains makes millions of them."""

import ctypes
import gc

import pytest
import torch

import mmgen_kernels as mk
from mmgen_kernels import backends


class Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
    )]  # fmt: skip


def live_bytes() -> int:
    gc.collect()
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Mallinfo2
    return mallinfo2().uordblks


X, VECTOR, HEADS, CODES = torch.randn(2, 8, 32), torch.randn(2, 32), torch.randn(2, 8, 2, 16), torch.randn(16, 32)
CALLS = {  # each with strings among its arguments, by value, by reference and optional
    "adaln": lambda: mk.adaln(X, VECTOR, VECTOR),
    "gate_residual_adaln": lambda: mk.gate_residual_adaln(X, X, VECTOR, VECTOR, VECTOR, post_norm="rms"),
    "qk_norm_rope": lambda: mk.qk_norm_rope(HEADS, HEADS, norm="rms"),
    "nearest_code": lambda: mk.nearest_code(X, CODES),
    "add_noise": lambda: mk.add_noise(X, X, torch.tensor([0.2, 0.7]), path="linear", target="epsilon"),
}


@pytest.mark.skipif(backends.library_error() is not None, reason="the C++ part is not there")
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="this C library does not tell")
@pytest.mark.parametrize("name", CALLS)
def test_a_call_leaves_nothing_on_the_heap(name):
    """A string of torch's own did, 48 bytes for each string argument: csrc/boxed.h."""
    call, times = CALLS[name], 1000
    for _ in range(20):
        call()
    before = live_bytes()
    for _ in range(times):
        call()
    assert (live_bytes() - before) / times < 16
