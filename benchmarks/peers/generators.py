"""Noise as training scripts draw it: from a generator whose state advances. PyTorch: BSD-3-Clause; NumPy: BSD-3-Clause."""

import torch

from benchmarks.harness import Contestant


def _randn(keys, out):
    generator = torch.Generator(out.device).manual_seed(2026)
    return lambda: torch.randn(out.shape, generator=generator, device=out.device, dtype=out.dtype)


def _randn_per_sample(keys, out):
    """diffusers' randn_tensor with a list of generators: a sample's noise does not depend on the batch."""
    generators = [torch.Generator(out.device).manual_seed(seed) for seed in range(len(out))]

    def call():
        samples = [torch.randn(out.shape[1:], generator=g, device=out.device, dtype=out.dtype) for g in generators]
        return torch.stack(samples)

    return call


def _rand(keys, out):
    generator = torch.Generator(out.device).manual_seed(2026)
    return lambda: torch.rand(out.shape, generator=generator, device=out.device, dtype=out.dtype)


def _numpy(method):
    def make(keys, out):
        import numpy

        generator = numpy.random.Generator(numpy.random.Philox(2026))
        return lambda: torch.from_numpy(getattr(generator, method)(tuple(out.shape), dtype=numpy.float32))

    return make


randn = Contestant("randn", _randn)
randn_per_sample = Contestant("randn-per-sample", _randn_per_sample)
rand = Contestant("rand", _rand)
numpy_normal = Contestant("numpy", _numpy("standard_normal"), requires="numpy", devices=("cpu",))
numpy_uniform = Contestant("numpy", _numpy("random"), requires="numpy", devices=("cpu",))
