"""Stand-ins for layers of libraries that are not installed here, written from their papers' equations and the public facts
of their interface: names of attributes and arguments, order of results. They are plain and hold the matrix N x K."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def squared_distances(rows, codes):
    """|x|^2 - 2 x c + |c|^2, (N, K): van den Oord et al. 2017, eq. 1."""
    return rows.square().sum(1, keepdim=True) - 2 * rows @ codes.t() + codes.square().sum(1)


def mse(a, b):
    return (a - b).square().mean()


class VectorQuantizer2(nn.Module):
    """taming-transformers (Esser et al. 2021, eq. 4). With `legacy`, beta weighs the codebook's term."""

    WIDTH = "e_dim"

    def __init__(self, n_e, dim, beta, remap=None, unknown_index="random", sane_index_shape=False, legacy=True):
        super().__init__()
        self.n_e, self.beta, self.legacy, self.remap, self.sane_index_shape = n_e, beta, legacy, remap, sane_index_shape
        setattr(self, self.WIDTH, dim)
        self.embedding = nn.Embedding(n_e, dim)
        nn.init.normal_(self.embedding.weight)
        self.re_embed = n_e
        if remap is not None:
            self.register_buffer("used", torch.from_numpy(np.load(remap)))
            self.re_embed, self.unknown_index = len(self.used), unknown_index

    def remap_to_used(self, indices):
        found = indices[..., None] == self.used
        new = found.int().argmax(-1)
        unknown = ~found.any(-1)
        if self.unknown_index == "random":
            new[unknown] = torch.randint(self.re_embed, (int(unknown.sum()),))
        else:
            new[unknown] = self.unknown_index
        return new

    def quantized(self, z):
        rows = z.movedim(1, -1)  # (B, H, W, C)
        indices = squared_distances(rows.flatten(0, 2), self.embedding.weight).argmin(1)
        codes = self.embedding(indices).view(rows.shape)
        to_rows, to_codes = mse(codes.detach(), rows), mse(codes, rows.detach())
        loss = to_rows + self.beta * to_codes if self.legacy else to_codes + self.beta * to_rows
        codes = (rows + (codes - rows).detach()).movedim(-1, 1).contiguous()
        if self.remap is not None:
            indices = self.remap_to_used(indices.view(len(z), -1)).view(-1, 1)
        if self.sane_index_shape:
            indices = indices.view(rows.shape[:3])
        return codes, loss, (None, None, indices)

    def forward(self, z, temp=None, rescale_logits=False, return_logits=False):
        assert temp in (None, 1.0) and not rescale_logits and not return_logits
        return self.quantized(z)


class DiffusersVectorQuantizer(VectorQuantizer2):
    """diffusers: the same with another name for the width. Bears the library's own class and module name."""

    WIDTH = "vq_embed_dim"

    def forward(self, z):
        return self.quantized(z)


DiffusersVectorQuantizer.__name__ = "VectorQuantizer"
DiffusersVectorQuantizer.__module__ = "diffusers.models.autoencoders.vae"


class VectorQuantizer(nn.Module):
    """LlamaGen (Sun et al. 2024): codes on the sphere, entropy term as in MaskGIT's tokenizer at temperature 0.01."""

    def __init__(self, n_e, e_dim, beta, entropy_loss_ratio, l2_norm, show_usage):
        super().__init__()
        self.n_e, self.e_dim, self.beta, self.entropy_loss_ratio = n_e, e_dim, beta, entropy_loss_ratio
        self.l2_norm, self.show_usage = l2_norm, show_usage
        self.embedding = nn.Embedding(n_e, e_dim)
        if show_usage:
            self.register_buffer("codebook_used", torch.zeros(65536))

    def forward(self, z):
        rows, codebook = z.permute(0, 2, 3, 1), self.embedding.weight
        if self.l2_norm:
            rows, codebook = F.normalize(rows, dim=-1), F.normalize(codebook, dim=-1)
        distances = squared_distances(rows.flatten(0, 2), codebook)
        indices = distances.argmin(1)
        codes = codebook[indices].view(rows.shape)
        usage, losses = 0, (None, None, None)
        if self.training:
            if self.show_usage:
                recent = torch.cat([self.codebook_used[len(indices) :], indices.float()])
                self.codebook_used.copy_(recent)
                usage = recent.unique().numel() / self.n_e
            logits = -distances / 0.01
            p = logits.softmax(-1)
            mean = p.mean(0)
            entropy = -(p * logits.log_softmax(-1)).sum(-1).mean() + (mean * (mean + 1e-5).log()).sum()
            losses = mse(codes, rows.detach()), self.beta * mse(codes.detach(), rows), self.entropy_loss_ratio * entropy
        codes = (rows + (codes - rows).detach()).permute(0, 3, 1, 2)
        return codes, (*losses, usage), (None, None, indices)


def trained(module, make_input, steps=3, calls=(({}),), seed=0):
    """What `steps` training steps and one call in eval mode leave: outputs, losses, gradients, parameters and buffers.

    An encoder stands in front of the module and learns with it. Losses are all float results but the first; the first is
    drawn to a target.
    """
    torch.manual_seed(seed)
    left = {}
    first = make_input()
    encoder = nn.Parameter(torch.full_like(first[0], 0.9))
    parameters = [encoder, *module.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for step in range(steps + 1):
        module.train(step < steps)
        for number, options in enumerate(calls):
            outputs = torch.utils._pytree.tree_flatten(module(make_input() * encoder, **options))[0]
            total = (outputs[0] - 1).square().mean()
            for i, output in enumerate(outputs):
                left[f"step {step} call {number} output {i}"] = output.detach().clone() if torch.is_tensor(output) else output
                if i and torch.is_tensor(output) and output.is_floating_point():
                    total = total + output.sum() * (1 + 0.1 * i)
            if total.requires_grad:
                total.backward()
            for i, p in enumerate(parameters):
                left[f"step {step} call {number} gradient {i}"] = None if p.grad is None else p.grad.clone()
            if step < steps:
                optimizer.step()
            optimizer.zero_grad()
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            left[f"step {step} {name}"] = tensor.detach().clone()
    return left


def assert_same_training(ours, stock):
    assert ours.keys() == stock.keys()
    for name, expected in stock.items():
        found = ours[name]
        if not torch.is_tensor(expected):
            assert found == expected, name
        elif expected.is_floating_point():
            scale = float(expected.abs().max()) if expected.numel() else 0.0
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * scale + 1e-12, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert torch.equal(found, expected), name
