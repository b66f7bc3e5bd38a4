"""csrc/philox.h by itself, as another program or a CUDA kernel takes it."""

import shutil
import struct
import subprocess

import pytest
import torch

import mmgen_kernels as mk
from mmgen_kernels import battery
from mmgen_kernels.battery.philox.streams import error_of_normals
from mmgen_kernels.philox import reference

IMPLEMENTATIONS = battery.implementations("philox_normal", torch.device("cpu"))
KEY = torch.tensor([2026, 0])

EXTREMES = """
#include <cstdio>
#include "philox.h"
using namespace mmgen_kernels::philox;
int main() {
  unsigned radius, angle;
  while (std::scanf("%u %u", &radius, &angle) == 2) {
    float cosine, sine;
    box_muller<OneLane>(radius, angle, cosine, sine);
    std::printf("%08x %08x\\n", OneLane::bits_of(cosine), OneLane::bits_of(sine));
  }
}
"""


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_the_header_alone_at_the_extremes(tmp_path, request):
    """One lane, as CUDA code takes it: words that a stream hits once in 2^32, and the words of a stream."""
    edges = [0, 1, 2**8, 2**23, 2**24 + 1, 2**28, 2**29, 3 * 2**29, 2**30, 2**31, 3 * 2**30, 7 * 2**29, 2**32]
    values = sorted({(edge + step) % 2**32 for edge in edges for step in (-2, -1, 0, 1)})
    pairs = torch.cartesian_prod(torch.tensor(values), torch.tensor(values))
    pairs = torch.cat([pairs, reference.philox_integers(KEY, [5000, 2])])
    source, binary = tmp_path / "extremes.cpp", tmp_path / "extremes"
    source.write_text(EXTREMES)
    flags = ["-std=c++20", "-O2", "-ffp-contract=off", "-Wall", "-Werror", f"-I{request.config.rootpath / 'csrc'}"]
    subprocess.run(["c++", *flags, str(source), "-o", str(binary)], check=True)
    given = "\n".join(f"{radius} {angle}" for radius, angle in pairs.tolist())
    lines = subprocess.run([binary], input=given, capture_output=True, text=True, check=True).stdout.split()
    got = torch.tensor([struct.unpack(">f", bytes.fromhex(word))[0] for word in lines]).view(-1, 2)
    truth = torch.stack(reference.box_muller(pairs[:, 0], pairs[:, 1]), -1)
    assert error_of_normals(got, truth)[1] is None
    with mk.use_backend(IMPLEMENTATIONS[0]):
        stream = mk.philox_normal((5000, 2), KEY)
    assert IMPLEMENTATIONS[0] != "cpp" or torch.equal(got[-5000:], stream)
    # all of it finite, never zero, and nothing beyond the largest R
    assert got.abs().max() < 6.77 and got.abs().min() > 1e-14


CUDA = """
#include "philox.h"
using namespace mmgen_kernels::philox;
__global__ void normals(uint64_t seed, uint64_t offset, float4* out) {
  const uint64_t i = blockIdx.x * uint64_t(blockDim.x) + threadIdx.x;
  uint64_t words[4];
  block<OneLane>(seed, offset + i, words);
  box_muller<OneLane>(uint32_t(words[0]), uint32_t(words[1]), out[i].x, out[i].y);
  box_muller<OneLane>(uint32_t(words[2]), uint32_t(words[3]), out[i].z, out[i].w);
}
"""


@pytest.mark.long
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_cuda_code_takes_the_header_and_fuses_nothing(tmp_path, request):
    source, ptx = tmp_path / "normals.cu", tmp_path / "normals.ptx"
    source.write_text(CUDA)
    flags = ["-std=c++20", "-O3", "-arch=sm_90", "-ptx", "-Werror", "all-warnings", f"-I{request.config.rootpath / 'csrc'}"]
    subprocess.run(["nvcc", *flags, str(source), "-o", str(ptx)], check=True)
    assert "fma.rn.f32" not in ptx.read_text()
