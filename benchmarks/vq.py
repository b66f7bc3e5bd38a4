"""The vq family: nearest-codebook lookup, the training step around it, and the data sets that break lookups.

Shapes are N x K x D: rows, codes, width; `h8` behind it means eight heads with a codebook each.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import vq_oracle
from benchmarks.bars import Bar, below, faster, fastest, share
from benchmarks.harness import Case, Contestant
from benchmarks.peers import addmm, cdist, compiled, faiss_cpu, flash, lucidrains, scikit_learn, stock_quantizer

# Above this many fp64 scores the oracle takes every n-th row; the results say how many were checked.
ORACLE_SCORES = 2**30

LOOKUP_SHAPES = {
    "16384x16384x8": "VQGAN at width 8, 64 images",
    "4096x16384x8": "LlamaGen VQ-16",
    "8192x16384x256": "taming VQGAN, 32 images",
    "8192x1024x64": "small VQ-VAE",
    "4096x8192x256": "IBQ",
    "32768x8192x3": "LDM vq-f4, 8 images",
    "16384x4096x8h8": "UniTok, 8 heads",
    "4800x1024x128": "EnCodec 24 kHz, one level",
    "1024x262144x256": "IBQ, 4 images",
    "65536x2000x1024": "HuBERT units, offline",
    "16384x16384x4": "LDM vq-f8, 16 images",
    "8192x100000x8": "VQGAN-LC",
    "2048x65536x128": "SimVQ, 8 images",
    "10880x4096x32": "VAR, ten scales of 16 images",
    "2048x16384x256": "RQ-VAE, one level, 32 images",
    "3200x2048x128": "MusicGen's EnCodec, one level",
    "2376x1024x8": "DAC, one level",
    "9600x2048x256": "Mimi, one level",
    "4800x4096x512": "WavTokenizer",
    "16384x8192x16": "BEST-RQ, one head",
    "65536x256x32": "TIGER semantic IDs, one level",
    "4096x4096x12": "TiTok, width 12",
}
TRAINING_SHAPES = {
    "4096x16384x8": "LlamaGen VQ-16",
    "8192x1024x64": "small VQ-VAE",
    "4800x1024x128": "EnCodec 24 kHz, one level",
    "4096x8192x256": "IBQ",
}
MEMORY_SHAPE = "8192x262144x64"
ADVERSARIAL_SHAPE = "4096x16384x64"
QUICK = ("lookup/4096x16384x8", "lookup/8192x1024x64", "training/8192x1024x64", "adversarial/taming-init")


def _ours(precision: str) -> Callable:
    def make(x, codebook):
        import mmgen_kernels as mk

        return lambda: mk.nearest_code(x, codebook, precision=precision)

    return make


def _ours_fp32(x, codebook):
    """The exact lookup without a first pass in bf16: what it was before AMX, and is on CPUs without."""
    import mmgen_kernels as mk
    from mmgen_kernels import _probe

    best = next(name for name in ("avx512", "avx2", "scalar") if name in _probe.instruction_sets())

    def call():
        before = os.environ.pop("MMGEN_KERNELS_CPU", None)
        os.environ["MMGEN_KERNELS_CPU"] = best
        try:
            return mk.nearest_code(x, codebook)
        finally:
            del os.environ["MMGEN_KERNELS_CPU"]
            if before is not None:
                os.environ["MMGEN_KERNELS_CPU"] = before

    return call


def _ours_by(implementation: str) -> Callable:
    def make(x, codebook):
        import mmgen_kernels as mk

        def call():
            with mk.use_backend(implementation):
                return mk.nearest_code(x, codebook)

        return call

    return make


def _our_step(x, codebook, upstream):
    import mmgen_kernels as mk

    def quantizer(x, codebook):
        result = mk.vector_quantize(x, codebook, beta=stock_quantizer.BETA)
        return result.quantized, result.indices, result.loss

    return stock_quantizer.step_with(quantizer, x, codebook, upstream)


OURS = Contestant("ours", _ours("exact"), requires="mmgen_kernels", exact=True)
OURS_FAST = Contestant("ours-fast", _ours("fast"), requires="mmgen_kernels")
OURS_FP32 = Contestant("ours-fp32", _ours_fp32, requires="mmgen_kernels._probe", devices=("cpu",), exact=True)
OURS_TRITON = Contestant("ours-triton", _ours_by("triton"), requires="triton", devices=("cuda",), exact=True)
OURS_CUDA = Contestant("ours-cuda", _ours_by("cuda"), requires="mmgen_kernels", devices=("cuda",), exact=True)
OURS_ON_GAUSSIAN = Contestant(
    "ours-on-gaussian", _ours("exact"), requires="mmgen_kernels", exact=True, inputs="gaussian"
)
OUR_STEP = Contestant("ours", _our_step, requires="mmgen_kernels", exact=True, settings={"beta": stock_quantizer.BETA})

LOOKUPS = (
    OURS,
    OURS_FAST,
    OURS_FP32,
    OURS_TRITON,
    OURS_CUDA,
    faiss_cpu.nearest_code,
    scikit_learn.nearest_code,
    compiled.nearest_code,
    addmm.nearest_code,
    cdist.nearest_code,
    lucidrains.nearest_code,
    *flash.nearest_code,
)
STEPS = (OUR_STEP, stock_quantizer.vector_quantize, compiled.vector_quantize, lucidrains.vector_quantize)
ADVERSARIAL = (OURS, OURS_ON_GAUSSIAN, OURS_FAST, OURS_FP32, faiss_cpu.nearest_code, addmm.nearest_code, cdist.nearest_code)


def parse_shape(shape: str) -> dict[str, int]:
    sizes, _, heads = shape.partition("h")
    n, k, d = (int(size) for size in sizes.split("x"))
    return {"N": n, "K": k, "D": d, "H": int(heads or 1)}


def gaussian(dims: dict[str, int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """x (N, D) and codebook (K, D), with a leading H if there are heads."""
    generator = torch.Generator().manual_seed(seed)
    lead = (dims["H"],) if dims["H"] > 1 else ()
    x = torch.randn(*lead, dims["N"], dims["D"], generator=generator)
    return x, torch.randn(*lead, dims["K"], dims["D"], generator=generator)


def _normalised(x, codes):
    return torch.nn.functional.normalize(x, dim=-1), torch.nn.functional.normalize(codes, dim=-1)


def _taming_init(x, codes):
    return x, torch.rand(codes.shape, generator=torch.Generator().manual_seed(1)).mul_(2).sub_(1).div_(len(codes))


def _spread(x, codes):
    generator = torch.Generator().manual_seed(1)
    return tuple(rows * 100 ** torch.rand(len(rows), 1, generator=generator) for rows in (x, codes))


def _duplicated(x, codes):
    draws = torch.randint(0, max(1, len(codes) // 4), (len(codes),), generator=torch.Generator().manual_seed(1))
    return x, codes[draws]


def _zeros(x, codes):
    x[::8], codes[::8] = 0, 0
    return x, codes


# name -> (how Gaussian data is changed, shape, what it is). The Gaussian twin that is raced beside has the same N K.
DATA_SETS = {
    "l2-normalised": (_normalised, ADVERSARIAL_SHAPE, "rows and codes on the unit sphere"),
    "taming-init": (_taming_init, ADVERSARIAL_SHAPE, "codes U(-1/K, 1/K): all rows nearly as far from all codes"),
    "offset": (lambda x, codes: (x + 1e4, codes + 1e4), ADVERSARIAL_SHAPE, "everything + 1e4"),
    "norm-spread": (_spread, ADVERSARIAL_SHAPE, "norms spread over 1 to 100"),
    "duplicated": (_duplicated, ADVERSARIAL_SHAPE, "codes drawn with replacement from K / 4: exact ties"),
    "zeros": (_zeros, ADVERSARIAL_SHAPE, "every eighth row and code zero"),
    "many-codes": (lambda x, codes: (x, codes), "1024x262144x64", "262144 codes"),
    "huge": (lambda x, codes: (x * 1e20, codes * 1e20), ADVERSARIAL_SHAPE, "values near 1e20: squares overflow"),
    "tiny": (lambda x, codes: (x * 1e-20, codes * 1e-20), ADVERSARIAL_SHAPE, "values near 1e-20: squares underflow"),
}


def _placed(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.to(device) for tensor in tensors)


def _shrunk(dims: dict[str, int]) -> dict[str, int]:
    return {**dims, "N": min(dims["N"], 64), "K": min(dims["K"], 128)}


def _oracle_rows(dims: dict[str, int]) -> slice:
    return slice(None, None, max(1, dims["H"] * dims["N"] * dims["K"] // ORACLE_SCORES))


def _case(group: str, name: str, dims: dict[str, int], contestants, inputs, judge, *, note="", tolerance=None) -> Case:
    n, k, d, h = (dims[key] for key in "NKDH")
    traffic = 4 * h * (n * d + k * d) + 8 * h * n  # x, codebook and the indices, once each
    return Case(
        name=f"{group}/{name}",
        group=group,
        contestants=contestants,
        inputs=inputs,
        judge=judge,
        flops=2.0 * h * n * k * d,
        bytes=float(traffic),
        limit="fma_gflops",
        scratch_units=float(h * n * k),
        dims=dims,
        tolerance=tolerance,
        note=note,
    )


def _lookup_judge(dims: dict[str, int]) -> Callable[[Contestant, tuple, object], dict]:
    truths: dict[str, Tensor] = {}

    def judge(contestant: Contestant, given: tuple, indices) -> dict:
        x, codebook = given
        rows = _oracle_rows(dims)
        if contestant.inputs not in truths:
            truths[contestant.inputs] = vq_oracle.nearest(x[..., rows, :], codebook)
        return vq_oracle.count_wrong(indices[..., rows].to(x.device), truths[contestant.inputs])

    return judge


def lookup_case(shape: str, device: torch.device, *, group="lookup", contestants=LOOKUPS, note="") -> Case:
    dims = parse_shape(shape)

    def inputs(tiny: bool) -> dict[str, tuple]:
        return {"data": _placed(device, *gaussian(_shrunk(dims) if tiny else dims))}

    return _case(group, shape, dims, contestants, inputs, _lookup_judge(dims), note=note)


def training_case(shape: str, device: torch.device, *, contestants=STEPS, note="") -> Case:
    dims = parse_shape(shape)
    lookup_judge = _lookup_judge(dims)

    def inputs(tiny: bool) -> dict[str, tuple]:
        x, codebook = gaussian(_shrunk(dims) if tiny else dims)
        # as large as the loss's own gradient, so that the error of neither hides in the other
        upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)) / x.numel()
        return {"data": _placed(device, x, codebook, upstream)}

    def judge(contestant: Contestant, given: tuple, output) -> dict:
        (x, codebook, upstream), (indices, *results) = given, output
        truth = vq_oracle.training_step(x, codebook, indices, upstream, contestant.settings["beta"])
        error = max(vq_oracle.relative_error(got, true) for got, true in zip(results, truth, strict=True))
        return {**lookup_judge(contestant, (x, codebook), indices), "error": error}

    # fp32 sums of some thousand terms; a wrong formula is off by far more
    return _case("training", shape, dims, contestants, inputs, judge, note=note, tolerance=1e-4)


def adversarial_case(name: str, device: torch.device, shape: str | None = None) -> Case:
    change, usual_shape, note = DATA_SETS[name]
    dims = parse_shape(shape or usual_shape)
    base = parse_shape(shape or ADVERSARIAL_SHAPE)
    twin = {**dims, "K": base["K"], "N": dims["N"] * dims["K"] // base["K"]}

    def inputs(tiny: bool) -> dict[str, tuple]:
        data, plain = ((_shrunk(size) if tiny else size) for size in (dims, twin))
        return {"data": _placed(device, *change(*gaussian(data))), "gaussian": _placed(device, *gaussian(plain))}

    return _case("adversarial", name, dims, ADVERSARIAL, inputs, _lookup_judge(dims), note=note)


def cases(device: torch.device) -> list[Case]:
    return [
        *(lookup_case(shape, device, note=note) for shape, note in LOOKUP_SHAPES.items()),
        *(training_case(shape, device, note=note) for shape, note in TRAINING_SHAPES.items()),
        *(adversarial_case(name, device) for name in DATA_SETS),
        lookup_case(MEMORY_SHAPE, device, group="memory", note="a score matrix would take 8 GiB"),
    ]


def bars(results: dict[str, dict]) -> list[Bar]:
    """What the project promises of this family; `results` maps case names to their records."""
    lookups = [name for name in results if name.startswith("lookup/")]
    wide = [name for name in lookups if results[name]["dims"]["D"] >= 64]
    narrow = [name for name in lookups if results[name]["dims"]["D"] == 8]
    rivals = [contestant.name for contestant in (*LOOKUPS, *STEPS) if not contestant.name.startswith("ours")]
    fp32_against_faiss = {"16384x16384x8": 1.3, "4096x16384x8": 5.0, "8192x16384x256": 1.05, "8192x1024x64": 1.8}
    amx_against_faiss = {"8192x16384x256": 4.0, "8192x1024x64": 3.0, "4800x1024x128": 3.0, "16384x16384x8": 2.0}
    return [
        *(share(results, name, "ours-fp32", 0.65) for name in wide),
        *(faster(results, f"lookup/{shape}", "ours-fp32", "faiss", times) for shape, times in fp32_against_faiss.items()),
        *(faster(results, f"lookup/{shape}", "ours", "faiss", times) for shape, times in amx_against_faiss.items()),
        *(faster(results, name, "ours-fp32", "cdist", 30.0) for name in narrow),
        *(fastest(results, name, "ours", rivals) for name in results if name.startswith(("lookup/", "training/"))),
        *(faster(results, f"adversarial/{name}", "ours", "ours-on-gaussian", 0.5) for name in DATA_SETS),
        *(faster(results, f"adversarial/{name}", "ours", "ours-fp32", 0.5) for name in DATA_SETS),
        below(f"memory/{MEMORY_SHAPE}: extra MiB of ours", _extra_mib(results), 48.0),
    ]


def _extra_mib(results: dict[str, dict]) -> float | None:
    extra = results.get(f"memory/{MEMORY_SHAPE}", {}).get("contestants", {}).get("ours", {}).get("extra_bytes")
    return None if extra is None else extra / 2**20
