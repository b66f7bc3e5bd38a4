"""lucidrains' vector-quantize-pytorch, the library most training scripts use. MIT.

Lookup: the module in eval mode without gradients. Step: a learnable codebook with the plain straight-through estimator,
so that it does the same mathematics as the others; its one loss term moves inputs and codes alike, so its beta is 1.
Heads have a codebook each.
"""

import torch

from benchmarks.harness import Contestant

BETA = 1.0


def _module(codebook, **options):
    from vector_quantize_pytorch import VectorQuantize

    heads = codebook.shape[0] if codebook.dim() == 3 else 1
    num_codes, width = codebook.shape[-2:]
    module = VectorQuantize(
        dim=width * heads,
        codebook_dim=width,
        codebook_size=num_codes,
        heads=heads,
        separate_codebook_per_head=heads > 1,
        rotation_trick=False,
        **options,
    ).to(codebook.device)
    module._codebook.embed.data.copy_(codebook.reshape(heads, num_codes, width))
    return module


def _lookup(x, codebook):
    module = _module(codebook).eval()
    if x.dim() == 2:
        tokens = x[None]  # (1, N, D)
        return torch.no_grad()(lambda: module(tokens)[1][0])
    tokens = x.permute(1, 0, 2).reshape(1, x.shape[1], -1)  # (1, N, H D)
    return torch.no_grad()(lambda: module(tokens)[1][0].t())


def _step(x, codebook, upstream):
    module = _module(codebook, learnable_codebook=True, ema_update=False, commitment_weight=1.0).train()
    tokens, upstream = x[None].detach().requires_grad_(), upstream[None]
    weight = module._codebook.embed

    def step():
        quantized, indices, loss = module(tokens)
        dx, dcodebook = torch.autograd.grad((quantized, loss), (tokens, weight), (upstream, torch.ones_like(loss)))
        # its single term has the gradients of two, and half their value
        return indices[0], 2 * loss.detach(), dx[0], dcodebook[0]

    return step


# measured bytes per N x K element: scores and their intermediates, the one-hot as int64 and as float
nearest_code = Contestant("lucidrains", _lookup, requires="vector_quantize_pytorch", scratch=16.5)
vector_quantize = Contestant(
    "lucidrains", _step, requires="vector_quantize_pytorch", scratch=24.5, settings={"beta": BETA}
)
