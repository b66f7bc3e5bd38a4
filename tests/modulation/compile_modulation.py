"""Compiles the family's kernels for chips that are not there, and prints what the machine code holds, a line of JSON each.

A script of its own, as a process in which TRITON_INTERPRET is set cannot compile. Arguments: [[operator,
configuration, D, dtype, capability], ...] as JSON.
"""

import json
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "vq"))
sys.path.insert(0, str(Path(__file__).parents[1]))
from triton_compile import machine_code
from triton_launches import Recorder

from mmgen_kernels.modulation import triton_kernels
from mmgen_kernels.modulation.triton_kernels import backward, forward, sums

PRESENT = {
    "dit": {"vectors": "gate shift scale"},
    "table": {"vectors": "gate shift scale", "table": True, "vector_dtype": torch.float32},
    "token": {"vectors": "gate shift scale", "frames": 8, "table": True},
    "rows": {"vectors": "gate shift scale", "by_row": True},
    "affine": {"vectors": "gate shift scale", "affine": True},
    "sandwich": {"vectors": "gate scale", "norm": "rms", "post_norm": "rms", "post_weight": True, "gate_fn": "tanh"},
    "two": {"vectors": "gate shift scale shift_2 scale_2", "norm": "rms"},
    "autocast": {"vectors": "gate shift scale", "x_dtype": torch.float32},
}  # fmt: skip
B, T = 3, 8


def layouts_of_sums(text):
    """Of the rows that are added, in turn: how values lie in threads decides the order in which they are added."""
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\.\w+<.*>)$", text, re.MULTILINE))
    return [layouts[name] for name in re.findall(r"\}\) : \(tensor<[0-9x]+xf32, (#\w+)>\) -> tensor<", text)]


def describe(compiled):
    return machine_code(compiled) | {"sums": layouts_of_sums(compiled.asm["ttgir"])}


def facts(operator, configuration, dim, dtype, capability):
    options, found = PRESENT[configuration], []
    forward.modulate_tokens = Recorder(FORWARD, capability, found, describe)
    chip = divmod(capability, 10)
    forward.chip = backward.chip = lambda device: chip
    backward.backward_chunks = Recorder(BACKWARD, capability, found, describe)
    sums.sum_chunks = Recorder(SUMS, capability, found, describe)
    dtype = getattr(torch, dtype)
    x_dtype, rows = options.get("x_dtype", dtype), None
    x = torch.empty(B, T, dim, dtype=x_dtype)
    y, grad = torch.empty(B, T, dim, dtype=dtype), torch.empty(B, T, dim, dtype=dtype)
    vector_dtype = options.get("vector_dtype", dtype)
    chunked = torch.empty(B, options["frames"], 6 * dim, dtype=vector_dtype) if "frames" in options else None
    chunked = torch.empty(B, 6 * dim, dtype=vector_dtype) if chunked is None else chunked
    views = dict(zip(("gate", "shift", "scale", "shift_2", "scale_2"), chunked.chunk(6, -1), strict=False))
    if options.get("by_row"):
        rows = torch.zeros(B, T, dtype=torch.int32)
    vectors = {n: views[n] if n in options["vectors"].split() else None for n in views}
    norm_vectors = [vectors[n] for n in ("shift", "scale", "shift_2", "scale_2")]
    weight, bias = (torch.empty(dim), torch.empty(dim)) if options.get("affine") else (None, None)
    post_weight = torch.empty(dim) if options.get("post_weight") else None
    given = [n for n in vectors if vectors[n] is not None and not (operator == "adaln" and n == "gate")]
    given = ["gate"] if operator == "gate_residual" else given
    table = torch.empty(len(given), dim) if options.get("table") else None
    norm, gate_fn, post_norm = options.get("norm", "layer"), options.get("gate_fn", "identity"), options.get("post_norm")
    update, second = (gate_fn, post_norm), grad if "_2" in options["vectors"] else None
    if operator == "adaln":
        out = triton_kernels.adaln(x, *norm_vectors, weight, bias, table, rows, norm, 1e-6, dtype)
        triton_kernels.adaln_backward(grad, second, x, out[2], *norm_vectors, weight, bias, table, rows, norm, *[True] * 8)
    elif operator == "gate_residual":
        out = triton_kernels.gate_residual(x, y, vectors["gate"], post_weight, table, rows, *update, 1e-6)
        triton_kernels.gate_residual_backward(x, y, out[1], vectors["gate"], post_weight, table, rows, *update, *[True] * 4)
    else:
        shared = (vectors["gate"], *norm_vectors, weight, bias, post_weight, table, rows, *update)
        out = triton_kernels.gate_residual_adaln(x, y, *shared, 1e-6, norm, 1e-6, dtype)
        triton_kernels.gate_residual_adaln_backward(x, grad, second, y, out[0], out[3], out[4], *shared, norm, *[True] * 11)
    return found


if __name__ == "__main__":
    FORWARD, BACKWARD, SUMS = forward.modulate_tokens, backward.backward_chunks, sums.sum_chunks
    for request in json.loads(sys.argv[1]):
        print(json.dumps(facts(*request)), flush=True)
