"""Compiles the family's kernels for chips that are not there, and prints what the machine code holds, a line of JSON each.

A script of its own, as a process in which TRITON_INTERPRET is set cannot compile. Arguments: [[kernel, capability, D, metric], ...]
as JSON.
"""

import json
import os
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmgen_kernels.vq.triton_kernels import (
    codebook,
    dead_codes,
    entropy,
    entropy_sweeps,
    prepare,
    residual,
    residual_backward,
    residual_levels,
    residual_sums,
    search,
)
from mmgen_kernels.vq.triton_kernels.nearest_code import PREPARING, SETTLING, configuration

TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
FP16 = ("rows", "codes", "packed")
FP32 = ("x", "codebook", "half_squares", "ratios", "minima", "out", "cluster_size", "code_sum",
              "residual", "total", "residuals", "grad_loss", "upstream")
INT64 = ("index", "taken", "indices", "order", "slots", "starts", "counts", "key", "draws", "first", "sound", "rows_of_level")
BITS = ("decay_bits", "eps_bits", "threshold", "reset", "beta")  # of fp64 numbers
OTHER = {"mask": "*u8", "dead_counts": "*i32"} | dict.fromkeys(INT64, "*i64") | dict.fromkeys(BITS, "i64")
INT32 = ("parts", "chunks", "codes_per_chunk", "tiles", "tiles_per_chunk", "chunks_per_split", "level", "blocks")
INT32 += ("depth", "book_step", "start", "end")


def argument_type(name, constants):
    if name in constants:
        return "constexpr"
    if name.isupper() or name in INT32:
        return "i32"
    if re.fullmatch("(x|codebook|codes|sums|mask|upstream)_([hnkdl]|first)", name):
        return "i64" if name.endswith("_h") else "i32"
    return OTHER.get(name, "*fp16" if name in FP16 else "*fp32" if name in FP32 else "*fp64")


def facts(kernel, capability, dim, metric):
    if kernel == "residual_levels":
        return levels_facts(capability, dim, metric)
    if any(hasattr(getattr(module, kernel, None), "arg_names") for module in (residual_sums, residual_backward)):
        return walking_facts(kernel, capability, dim, metric)
    return (entropy_facts if hasattr(entropy_sweeps, kernel) else lookup_facts)(kernel, capability, dim, metric)


def entropy_facts(kernel, capability, dim, _):
    """D is divisible by 16 where it is: Triton specialises on that."""
    c = entropy.configuration(dim)
    function = getattr(entropy_sweeps, kernel)
    values = {"BLOCK_N": c.block_n, "BLOCK_K": c.block_k, "BLOCK_D": c.block_d, "BLOCK_OUT": c.block_out}
    constants = {name: values[name] for name in function.arg_names if name in values}
    sizes = ("N", "K", "D", "tiles", "tiles_per_range", "blocks", "blocks_per_range", "ranges", "columns")
    types = {n: "constexpr" if n in constants else "i32" if n in sizes else "*fp32" for n in function.arg_names}
    return code_of(function, types, constants, c.options(), capability, {"D"} if dim % 16 == 0 else set())


def levels_facts(capability, dim, metric):
    """D divisible by 16 as the launcher has it for wide rows; `taken` where the metric is l2."""
    c = residual.levels_configuration(dim, divmod(capability, 10))
    function = residual_levels.residual_levels
    constants = {"METRIC": metric, "HAS_TAKEN": metric == "l2", "DESCRIPTORS": c.descriptors}
    constants |= {"D_PAD": c.d_pad, "BLOCK_N": c.block_n, "BLOCK_K": c.block_k}
    if metric != "l2":
        constants["taken"] = None
    types = {name: argument_type(name, constants) for name in function.arg_names}
    if c.descriptors:
        types["codes"] = f"tensordesc<fp16[{c.block_k},{c.block_d}]>"
    return code_of(function, types, constants, residual.levels_options(c), capability, {"D"} if dim % 16 == 0 else set())


def walking_facts(kernel, capability, dim, which):
    """What walks through levels again, of 32 levels; `which` may be "gradient", "rotation", "wide" or "wide rotation"."""
    module = next(m for m in (residual_sums, residual_backward) if hasattr(m, kernel))
    function = getattr(module, kernel)
    wide = "wide" in which
    values = {"WIDE": wide, "KEEP": True, "GRADIENT": "gradient" in which, "ROTATE": "rotation" in which, "OF_QUANTIZED": True}
    columns = residual_sums.COLUMNS if kernel == "sum_level_runs" else 64
    values |= {"LEVELS": 32, "BLOCK_D": min(columns, codebook.block_of(dim))}
    constants = {name: values[name] for name in function.arg_names if name in values}
    types = {name: argument_type(name, constants) for name in function.arg_names}
    if wide:
        types = {name: "*fp64" if kind == "*fp32" else kind for name, kind in types.items()}
    if kernel == "pull_back" and values["ROTATE"]:
        types["out"] = "*fp64"
    return code_of(function, types, constants, codebook.OPTIONS, capability)


def lookup_facts(kernel, capability, dim, metric):
    c = configuration(dim, divmod(capability, 10))
    module = next(m for m in (search, prepare, codebook, dead_codes, residual, residual_levels) if hasattr(m, kernel))
    function = getattr(module, kernel)
    values = {"D_PAD": c.d_pad, "BLOCK_N": c.block_n, "BLOCK_K": c.block_k, "DESCRIPTORS": c.descriptors}
    values |= {"METRIC": metric, "HAS_MASK": metric == "l2", "WIDE": False}
    values |= {"NORMALIZE": metric == "cosine", "FIRST": metric == "first"}
    blocks = {"sweep": c.block_d, "mean_code": 16, "replace_dead": min(32, c.d_pad)}
    values["BLOCK_D"] = blocks.get(kernel, min(64, c.d_pad))
    if not values["HAS_MASK"]:
        values["mask"] = None
    names = function.arg_names
    constants = {name: values[name] for name in names if name in values}
    types = {name: argument_type(name, constants) for name in names}
    if kernel == "sweep" and c.descriptors:
        types["codes"] = f"tensordesc<fp16[{c.block_k},{c.block_d}]>"
    options = {"sweep": c.options(), "settle": SETTLING}.get(kernel, PREPARING)
    options = codebook.OPTIONS if module in (codebook, dead_codes) else options
    options = residual.LAUNCH if module in (residual, residual_levels) else options
    return code_of(function, types, constants, options, capability)


def code_of(function, types, constants, options, capability, divisible=frozenset()):
    names = function.arg_names
    source = ASTSource(
        fn=function,
        signature=types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name].startswith("*") or name in divisible},
    )
    return machine_code(triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options))


def machine_code(compiled):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([os.path.join(TOOLS, tool), option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    registers, stack, static, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage).groups())
    return {
        "registers": registers,
        "stack": stack + local,
        "shared": compiled.metadata.shared + static,
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "instructions": sorted(set(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA|UTMALDG)\b", code))),
        "fused": compiled.asm["ptx"].count("fma.rn.f64"),
        "fused_in_code": len(re.findall(r"\bDFMA\b", code)),
        "block_pointers": "make_tensor_ptr" in compiled.asm["ttir"],
    }


if __name__ == "__main__":
    for request in json.loads(sys.argv[1]):
        print(json.dumps(facts(*request)), flush=True)
