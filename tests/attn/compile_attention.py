"""Compiles the family's kernels for chips that are not there, and prints what the machine code holds, a line of JSON each.

A script of its own, as a process in which TRITON_INTERPRET is set cannot compile. Arguments: [[configuration, D, dtype,
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

from mmgen_kernels import backends
from mmgen_kernels.attn import triton_kernels
from mmgen_kernels.attn.triton_kernels import backward, forward

B, H = 2, 4
# T, then what else is given
PRESENT = {
    "long": {"T": 1024},
    "short": {"T": 256},
    "causal": {"T": 1024, "causal": True},
    "bias": {"T": 1024, "bias": True},
    "lengths": {"T": 1024, "lengths": True, "groups": 2},
    "packed": {"T": 1024, "packed": True},
    # the forward alone
    "pointers": {"T": 1024, "way": "pointers"},
    "warp_specialized": {"T": 1024, "way": "warp_specialized"},
    "warp_specialized, causal": {"T": 1024, "way": "warp_specialized", "causal": True},
}
# products that a tile of (BLOCK_M, BLOCK_N) needs
PRODUCTS = {"forward": 2, "backward_queries": 3, "backward_keys": 4, "backward_short": 5, "backward_bias": 2}


def describe(compiled):
    """What the machine code holds, and for each innermost loop with matrix instructions their multiplications by one block."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(Path(TOOLS) / "nvdisasm"), "-c", file.name]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    shapes = re.findall(r"\b(HGMMA\.\d+x\d+x\d+|HMMA\.\d+|UTCHMMA)\b", code)
    return machine_code(compiled) | {
        "matrix": {shape: shapes.count(shape) for shape in sorted(set(shapes))},
        "loops": [sum(loop) for loop in loops_of(code)],
        "all_instructions": len(re.findall(r"/\*[0-9a-f]{4,}\*/\s+\S", code)),
        "all_warps": compiled.metadata.num_warps,
        "specialized": "ttg.warp_specialize" in compiled.asm["ttgir"],
    }


def loops_of(code):
    """Multiplications of each matrix instruction of a warpgroup (sm_90) or a warp (sm_80), by innermost loop."""
    lines, labels, spans = code.splitlines(), {}, []
    for i, line in enumerate(lines):
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = i
        elif (jump := re.search(r"\bBRA\S*\s.*`\((\.L_x_\d+)\)", line)) and jump[1] in labels:
            spans.append((labels[jump[1]], i))
    found = {}
    for i, line in enumerate(lines):
        if instruction := re.search(r"\bHGMMA\.(\d+)x(\d+)x(\d+)", line):
            work = int(instruction[1]) * int(instruction[2]) * int(instruction[3])
        elif re.search(r"\bHMMA\.16816\b", line):
            work = 16 * 8 * 16
        else:
            continue
        around = [span for span in spans if span[0] <= i <= span[1]]
        found.setdefault(min(around, key=lambda s: s[1] - s[0], default=None), []).append(work)
    return list(found.values())


def facts(configuration, dim, dtype, capability):
    options, found = PRESENT[configuration], []
    chip = divmod(capability, 10)
    for module in (forward, backward):
        module.chip = lambda device: chip
        for name, kernel in KERNELS[module].items():
            setattr(module, name, Recorder(kernel, capability, found, describe))
    T, groups, dtype = options["T"], options.get("groups", H), getattr(torch, dtype)
    samples = 1 if "packed" in options else B
    packed_qkv = torch.empty(samples, T, H + 2 * groups, dim, dtype=dtype)
    q, k, v = packed_qkv.split((H, groups, groups), 2)
    bias = torch.empty(1, H, T, T) if "bias" in options else None
    lengths = torch.zeros(B, dtype=torch.int64) if "lengths" in options else None
    bounds = torch.zeros(5, dtype=torch.int32) if "packed" in options else None
    given = (q, k, v, bias, lengths, bounds, bounds)
    last = (options.get("causal", False), 0.1, True)
    backends.triton_attention = options.get("way", backends.TRITON_ATTENTIONS[0])
    out, lse = triton_kernels.attention(*given, *last)
    if "way" not in options:
        grad_lse = lse if "bias" in options else None
        triton_kernels.attention_backward(out, grad_lse, *given, out, lse, *last, True, True, True, bias is not None)
    for code in found:
        code["kernel"] = code["kernel"].removeprefix("attention_")
        c = configuration_of(code["kernel"], dtype, dim, chip, bias is not None, bounds is not None)
        code["useful"] = PRODUCTS[code["kernel"]] * c.block_m * c.block_n * dim
        code["loops"] = [loop * code["warps"] // (4 if capability == 90 else 1) for loop in code["loops"]]
    return found


def configuration_of(kernel, dtype, dim, chip, bias, packed):
    from mmgen_kernels.attn.triton_kernels import configuration

    further = {"forward": (bias,), "backward_queries": (bias, packed)}.get(kernel, ())
    return getattr(configuration, f"{kernel.removeprefix('backward_')}_configuration")(dtype, dim, chip, *further)


KERNELS = {
    module: {n: k for n, k in vars(module).items() if n.startswith("attention_") and hasattr(k, "params")}
    for module in (forward, backward)
}

if __name__ == "__main__":
    for request in json.loads(sys.argv[1]):
        print(json.dumps(facts(*request)), flush=True)
