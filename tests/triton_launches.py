"""Kernels compiled for chips that are not there: launchers run on tensors without data, and what they would launch is compiled."""

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

POINTERS = {torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
            torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8"}  # fmt: skip


def number(value):
    return "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"


class Recorder:
    """Stands where a kernel is, and compiles each launch with the types and divisibilities that Triton would find.

    `describe` takes what the compiler made, and its dictionary is appended to `found`.
    """

    def __init__(self, kernel, capability, found, describe):
        self.kernel, self.capability, self.found, self.describe = kernel, capability, found, describe

    def __getitem__(self, grid):
        return self.launch

    def warmup(self, *args, grid, **kwargs):
        """What does not compile, the launch will tell."""

    def launch(self, *args, **kwargs):
        names = [p.name for p in self.kernel.params]
        given = dict(zip(names, args, strict=False)) | {n: kwargs.pop(n) for n in list(kwargs) if n in names}
        signature, constants, attributes = {}, {}, {}
        for i, parameter in enumerate(self.kernel.params):
            value, name = given[parameter.name], parameter.name
            if isinstance(value, torch.Tensor):
                signature[name], attributes[(i,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
            elif isinstance(value, TensorDescriptor):
                signature[name] = f"tensordesc<{POINTERS[value.base.dtype][1:]}{value.block_shape}>"
            elif isinstance(value, tuple) and not parameter.is_constexpr:
                pointers = [isinstance(v, torch.Tensor) for v in value]
                signature[name] = tuple(POINTERS[v.dtype] if p else number(v) for v, p in zip(value, pointers, strict=True))
                attributes |= {(i, j): [["tt.divisibility", 16]] for j, p in enumerate(pointers) if p}
            elif parameter.is_constexpr or value is None or (value == 1 and not parameter.do_not_specialize):
                signature[name], constants[(i,)] = "constexpr", value
            else:
                signature[name] = number(value)
                if not isinstance(value, float) and value % 16 == 0 and not parameter.do_not_specialize:
                    attributes[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options=kwargs)
        self.found.append({"kernel": self.kernel.__name__, "warps": kwargs["num_warps"]} | self.describe(compiled))
