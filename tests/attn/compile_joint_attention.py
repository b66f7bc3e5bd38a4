"""Compiles the kernels of joint_attention for chips that are not there, and prints what the machine code holds, JSON by line.

A script of its own, as a process in which TRITON_INTERPRET is set cannot compile. Arguments: [[D, dtype, capability], ...] as JSON.
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "vq"))
sys.path.insert(0, str(Path(__file__).parents[1]))
from compile_attention import describe
from triton_launches import Recorder

from mmgen_kernels.attn.triton_kernels import joint

KERNELS = {n: k for n, k in vars(joint).items() if n.startswith("joint_") and hasattr(k, "params")}


def facts(dim, dtype, capability):
    """With grouped heads, and with lengths of the text."""
    found, chip = [], divmod(capability, 10)
    joint.chip = lambda device: chip
    for name, kernel in KERNELS.items():
        setattr(joint, name, Recorder(kernel, capability, found, describe))
    streams = []
    for tokens in (154, 1024):
        streams += torch.empty(2, tokens, 4 + 2 + 2, dim, dtype=getattr(torch, dtype)).split((4, 2, 2), 2)
    lengths = torch.empty(2, dtype=torch.int64)
    out_1, out_2, lse = joint.joint_attention(*streams, lengths, None, 0.1)
    joint.joint_attention_backward(out_1, out_2, *streams, lengths, None, out_1, out_2, lse, 0.1, *(True,) * 6)
    return found


if __name__ == "__main__":
    for request in json.loads(sys.argv[1]):
        print(json.dumps(facts(*request)), flush=True)
