"""The Triton kernels under Triton's interpreter, which has to be chosen before triton is imported: in a process of its own."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
import numpy, torch, triton
from triton.runtime import interpreter
import mmgen_kernels as mk
from mmgen_kernels.battery.philox.streams import KEYS, error_of_normals, keys_of
from mmgen_kernels.library import OPERATORS
from mmgen_kernels.philox import reference, triton_kernels

cast = interpreter.InterpreterBuilder.cast_impl
def round_to_bf16(self, source, to):  # the interpreter itself cuts off
    if source.dtype.scalar == triton.language.float32 and to.scalar == triton.language.bfloat16:
        bits = torch.from_numpy(numpy.ascontiguousarray(source.data)).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(bits, triton.language.bfloat16)
    return cast(self, source, to)
interpreter.InterpreterBuilder.cast_impl = round_to_bf16

for key in KEYS.values():
    integers = triton_kernels.philox_integers(torch.tensor(key), [1029])
    assert torch.equal(integers, reference.philox_integers(torch.tensor(key), [1029])), key
samples = [(torch.tensor([2026, 0]), [size]) for size in (0, 1, 5, 5000)]
samples += [(keys_of((3,)), [3, 7, 11]), (keys_of((2, 2)).transpose(0, 1), [2, 2, 2050]), (keys_of((3,)), [3, 0])]
for key, shape in samples:
    assert torch.equal(triton_kernels.philox_integers(key, shape), reference.philox_integers(key, shape)), shape
    truth = reference.philox_normal(key, shape, torch.float64)
    for dtype in reference.DIGITS:
        uniform = triton_kernels.philox_uniform(key, shape, dtype)
        assert torch.equal(uniform, reference.philox_uniform(key, shape, dtype)), (shape, dtype)
        normal = triton_kernels.philox_normal(key, shape, dtype)
        assert normal.shape == truth.shape and normal.dtype == dtype
        assert error_of_normals(normal, truth)[1] is None, (shape, dtype)
        if OPERATORS["philox_normal"].has_cpp and dtype != torch.float64:
            assert torch.equal(normal, mk.philox_normal(shape, key, dtype=dtype)), (shape, dtype)

triton_kernels.BLOCKS = 128  # the launch shape does not show
for key, shape in samples[3:5]:
    assert torch.equal(triton_kernels.philox_integers(key, shape), reference.philox_integers(key, shape)), shape

for key, i in ((keys_of((300,)), torch.arange(300)), (keys_of((3, 2)).transpose(0, 1), torch.arange(6).view(3, 2).t())):
    assert torch.equal(triton_kernels.fold_in(key, i), reference.fold_in(key, i))
none = keys_of((0,))
assert triton_kernels.fold_in(none, none[:, 0]).shape == (0, 2)
print("the same")
"""


def test_the_same_numbers_from_triton():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.strip() == "the same", done.stderr[-3000:]
