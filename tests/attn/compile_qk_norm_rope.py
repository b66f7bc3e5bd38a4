"""Compiles the kernels of qk_norm_rope for chips that are not there, and prints what the machine code holds, a line of JSON each.

A script of its own, as a process in which TRITON_INTERPRET is set cannot compile. Arguments: [[configuration, H, D, dtype,
capability], ...] as JSON.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "vq"))
sys.path.insert(0, str(Path(__file__).parents[1]))
from triton_compile import TOOLS, machine_code
from triton_launches import Recorder

from mmgen_kernels.attn import triton_kernels
from mmgen_kernels.attn.triton_kernels import rope_backward, rope_forward

B, T = 2, 64
PRESENT = {
    "rms": {},
    "half_split": {"interleaved": False},
    "layer": {"norm": "layer", "biases": True},
    "partial": {"part": 4, "biases": True, "interleaved": False},
    "no_angles": {"part": 0},
    "only_angles": {"norm": None},
    "across": {"across": True},
    "across_layer": {"across": True, "norm": "layer", "biases": True, "interleaved": False},
}


def describe(compiled):
    """What the machine code holds, and the widest load and store from and to memory, in bits."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(Path(TOOLS) / "nvdisasm"), "-c", file.name]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    widths = {name: re.findall(rf"\b{name}\.E(?:\.[A-Z]+\w*)*?(?:\.(64|128))?\b", code) for name in ("LDG", "STG")}
    return machine_code(compiled) | {name.lower(): max((int(b or 32) for b in bits), default=0) for name, bits in widths.items()}


def facts(configuration, heads, dim, dtype, capability):
    options, found = PRESENT[configuration], []
    rope_forward.norm_and_turn = Recorder(FORWARD, capability, found, describe)
    rope_backward.backward_chunks = Recorder(BACKWARD, capability, found, describe)
    rope_backward.sum_chunks = Recorder(SUMS, capability, found, describe)
    dtype = getattr(torch, dtype)
    q, k, _ = torch.empty(B, T, 3, heads, dim, dtype=dtype).unbind(2)
    norm, across = options.get("norm", "rms"), options.get("across", False)
    width = heads * dim if across else dim
    weight = None if norm is None else torch.empty(width)
    bias = torch.empty(width) if "biases" in options else None
    pairs = dim // 2 * options.get("part", 8) // 8
    cos = torch.empty(T, pairs) if pairs else None
    given = (q, k, weight, weight, bias, bias, cos, cos, norm, across, 1e-6, options.get("interleaved", True))
    rotated = triton_kernels.qk_norm_rope(*given)
    triton_kernels.qk_norm_rope_backward(*rotated, *given, *[True] * 6)
    return found


FORWARD = rope_forward.norm_and_turn
BACKWARD, SUMS = rope_backward.backward_chunks, rope_backward.sum_chunks

if __name__ == "__main__":
    for request in json.loads(sys.argv[1]):
        print(json.dumps(facts(*request)), flush=True)
