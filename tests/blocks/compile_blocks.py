"""Compiles the activation's kernels for chips that are not there, and prints what the machine code holds, a line of JSON each.

A script of its own, as a process in which TRITON_INTERPRET is set cannot compile.
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "vq"))
sys.path.insert(0, str(Path(__file__).parents[1]))
from triton_compile import machine_code
from triton_launches import Recorder

from mmgen_kernels.blocks import triton_kernels

KERNELS = {name: getattr(triton_kernels, name) for name in ("activation_forward", "activation_backward")}

if __name__ == "__main__":
    for capability in (80, 90, 100):
        found = []
        for name, kernel in KERNELS.items():
            setattr(triton_kernels, name, Recorder(kernel, capability, found, machine_code))
        for dtype in (torch.float32, torch.bfloat16):
            for kind in ("gelu_tanh", "swiglu"):
                hidden = torch.empty(2, 256, 4608, dtype=dtype)
                activated = triton_kernels.mlp_activation(hidden, kind)
                triton_kernels.mlp_activation_backward(activated, hidden, kind, True)
        for code in found:
            print(json.dumps(code), flush=True)
