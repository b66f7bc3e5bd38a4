"""`torch.cdist(x, codebook).argmin(-1)`, what diffusers' VectorQuantizer and Moshi do. PyTorch: BSD-3-Clause.

Called as they call it. The N x K distances are written and read back once.
"""

import torch

from benchmarks.harness import Contestant


def _lookup(x, codebook):
    return lambda: torch.cdist(x, codebook).argmin(dim=-1)


nearest_code = Contestant("cdist", _lookup, scratch=4.0)
