"""The Triton kernels without a GPU: run by Triton's interpreter, and compiled for GPUs that are not there.

The interpreter has to be chosen before triton is imported, and shuts out the compiler: processes of their own.
"""

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

COMPILED = """
import re, subprocess, sys
from pathlib import Path
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mmgen_kernels.philox import triton_kernels

tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
target = GPUTarget("cuda", int(sys.argv[1]), 32)
kernels = [("normal", 24, "fp32"), ("normal", 11, "fp16"), ("normal", 8, "bf16"), ("uniform", 24, "fp32"), ("integers", 32, "i64")]

def compiled(kernel, signature, constants):
    source = ASTSource(fn=kernel, signature=signature | dict.fromkeys(constants, "constexpr"), constexprs=constants)
    made = triton.compile(source, target=target, options={"enable_fp_fusion": False})
    assert "fma.rn.f32" not in made.asm["ptx"], constants  # one would change the bits
    Path("kernel.cubin").write_bytes(made.asm["cubin"])
    usage = subprocess.run([tool, "-res-usage", "kernel.cubin"], capture_output=True, text=True, check=True).stdout
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\\d+)", usage)}
    assert used["STACK"] == used["LOCAL"] == 0 and used["REG"] <= 128, (constants, usage)
    sass = subprocess.run([tool, "-sass", "kernel.cubin"], capture_output=True, text=True, check=True).stdout
    assert "EXIT" in sass and not re.search(r"\\b(STL|LDL)\\b", sass), constants

for kind, digits, out in kernels:
    signature = {"key_ptr": "*i64", "out_ptr": "*" + out, "size": "i64", "pieces": "i32"}
    compiled(triton_kernels.stream_kernel, signature, {"KIND": kind, "DIGITS": digits, "BLOCKS": triton_kernels.BLOCKS})
signature = {"key_ptr": "*i64", "i_ptr": "*i64", "out_ptr": "*i64", "keys": "i32"}
compiled(triton_kernels.fold_in_kernel, signature, {"BLOCKS": triton_kernels.BLOCKS})
print("compiled")
"""


@pytest.mark.long
@pytest.mark.parametrize("capability", (80, 90, 100))
def test_compiles_without_spills_or_contractions(tmp_path, capability):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILED, str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert done.stdout.strip() == "compiled", done.stderr[-3000:]


def test_the_same_numbers_from_triton():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.strip() == "the same", done.stderr[-3000:]
