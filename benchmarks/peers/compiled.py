"""`torch.compile` of the expanded form, and of the stock quantizer. PyTorch: BSD-3-Clause.

Static shapes and the whole graph, which is the most favourable setting. On a CPU the default mode: max-autotune was
timed on 4096x16384x8, 8192x1024x64 and 4096x8192x256 and stays within 10 % of it. On CUDA max-autotune, without its own
graphs because the harness captures one around every contestant.
"""

import torch

from benchmarks.harness import Contestant
from benchmarks.peers import stock_quantizer


def compile_static(function, device):
    # contestants of other shapes came before: without a reset the limit on recompilations would silently mean eager
    torch._dynamo.reset()
    mode = "max-autotune-no-cudagraphs" if device.type == "cuda" else None
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)


def _scores_argmin(x, codebook):
    return (codebook.square().sum(-1).unsqueeze(-2) - 2 * (x @ codebook.transpose(-1, -2))).argmin(dim=-1)


def _lookup(x, codebook):
    compiled = compile_static(_scores_argmin, x.device)
    return lambda: compiled(x, codebook)


def _step(x, codebook, upstream):
    return stock_quantizer.step_with(compile_static(stock_quantizer.quantize, x.device), x, codebook, upstream)


nearest_code = Contestant("compile", _lookup, scratch=4.0, compiles=True)
vector_quantize = Contestant("compile", _step, scratch=4.5, compiles=True, settings={"beta": stock_quantizer.BETA})
