"""A process in which Triton's interpreter runs the kernels on CPU tensors: TRITON_INTERPRET must be set before triton is imported.

And what makes the interpreter tell the truth about bf16, which it holds as 16-bit integers: a product would be taken of the raw
bits, and a cast would truncate. With the repair casts and matrix products are right and other arithmetic is an error; kernels widen
what they load anyway.
"""

import concurrent.futures
import inspect
import io
import multiprocessing
import os
import warnings

import numpy as np
import torch

import mmgen_kernels as mk


def interpreting_pool():
    """One process, whatever the caller's own environment says."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        pool = concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), prepare_process)
        assert pool.submit(is_interpreted).result()
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
    return pool


class Interpreter:
    """Used as mk.nearest_code is, by the Triton kernels."""

    def __init__(self):
        self.pool = interpreting_pool()

    def nearest_code(self, x, codebook, **options):
        request = io.BytesIO()
        torch.save((x, codebook, options), request)
        answer = self.pool.submit(answer_in_process, request.getvalue()).result()
        return torch.load(io.BytesIO(answer))

    def vector_quantize(self, x, codebook, **options):
        """Its results, and the gradients of their sum to x and to the codebook."""
        request = io.BytesIO()
        torch.save((x, codebook, options), request)
        answer = self.pool.submit(quantize_in_process, request.getvalue()).result()
        return torch.load(io.BytesIO(answer))

    def judge(self, operator, name):
        """(failures, repeatable) of each dtype of the battery's case, by the Triton kernels."""
        return self.pool.submit(judge_in_process, operator, name).result()

    def residual_quantize(self, x, codebooks, **options):
        """Its results, and the gradients of their sum to x and to the codebooks."""
        request = io.BytesIO()
        torch.save((x, codebooks, options), request)
        answer = self.pool.submit(quantize_residual_in_process, request.getvalue()).result()
        return torch.load(io.BytesIO(answer))

    def call(self, operator, *arguments):
        """What the operator's Triton launcher returns."""
        request = io.BytesIO()
        torch.save((operator, arguments), request)
        return torch.load(io.BytesIO(self.pool.submit(call_in_process, request.getvalue()).result()))

    def replace_dead_codes_(self, trained, rest):
        """What it makes of codebook, cluster_size and code_sum; the caller's stay as they are."""
        request = io.BytesIO()
        torch.save((trained, rest), request)
        return torch.load(io.BytesIO(self.pool.submit(replace_in_process, request.getvalue()).result()))

    def code_entropy(self, x, codebook, upstream, **options):
        """Entropies and gradients by name, as the battery's `run` gives them."""
        request = io.BytesIO()
        torch.save((x, codebook, upstream, options), request)
        answer = self.pool.submit(entropies_in_process, request.getvalue()).result()
        return torch.load(io.BytesIO(answer))

    def opcheck(self, *arguments, operator="nearest_code"):
        self.pool.submit(opcheck_in_process, operator, arguments).result()

    def close(self):
        self.pool.shutdown()


def is_interpreted():
    from mmgen_kernels import backends

    return backends.INTERPRETED


def answer_in_process(request):
    x, codebook, options = torch.load(io.BytesIO(request))
    with mk.use_backend("triton"):
        indices = mk.nearest_code(x, codebook, **options)
    answer = io.BytesIO()
    torch.save(indices, answer)
    return answer.getvalue()


def quantize_in_process(request):
    x, codebook, options = torch.load(io.BytesIO(request))
    answer = io.BytesIO()
    torch.save(with_gradients("triton", x, codebook, **options), answer)
    return answer.getvalue()


def with_gradients(implementation, x, codebook, **options):
    x, codebook = x.requires_grad_(), codebook.requires_grad_()
    with mk.use_backend(implementation):
        results = mk.vector_quantize(x, codebook, **options)
        gradients = torch.autograd.grad(results.quantized.sum() + results.loss, (x, codebook))
    return [r.detach() for r in (*results, *gradients)]


def judge_in_process(operator, name):
    from mmgen_kernels import battery

    (case,) = (c for c in battery.cases("vq") if c.operator == operator and c.name == name)
    outcomes = []
    for dtypes in case.dtypes:
        judge = case.prepare(torch.device("cpu"), dtypes)
        with mk.use_backend("triton"):
            outcome = judge()
        outcomes.append((outcome.failures, outcome.repeatable))
    return outcomes


def quantize_residual_in_process(request):
    x, codebooks, options = torch.load(io.BytesIO(request))
    answer = io.BytesIO()
    torch.save(residual_with_gradients("triton", x, codebooks, **options), answer)
    return answer.getvalue()


def residual_with_gradients(implementation, x, codebooks, sizes=None, shared=None, statistics=True, **options):
    """codebooks are split into `sizes`, or expanded over `shared` levels, after the gradient has found them."""
    x, codebooks = x.requires_grad_(), codebooks.requires_grad_()
    given = codebooks.split(sizes) if sizes else codebooks.expand(shared, *codebooks.shape) if shared else codebooks
    with mk.use_backend(implementation):
        out = mk.residual_quantize(x, given, statistics=statistics, **options)
        gradients = torch.autograd.grad(out.quantized.sum() + out.loss.sum(), (x, codebooks))
    collected = [torch.cat(s) if isinstance(s, list) else s for s in out[3:] if s is not None]
    return [r.detach() for r in (*out[:3], *gradients, *collected)]


def entropies_in_process(request):
    from mmgen_kernels.battery.vq.code_entropy import NAMES, run

    x, codebook, upstream, options = torch.load(io.BytesIO(request))
    uses = options.pop("uses", NAMES)
    answer = io.BytesIO()
    with mk.use_backend("triton"):
        torch.save(run(lambda a, b: mk.code_entropy(a, b, **options), x, codebook, upstream, uses), answer)
    return answer.getvalue()


def replace_in_process(request):
    trained, rest = torch.load(io.BytesIO(request))
    torch.ops.mmgen_kernels.replace_dead_codes_.triton(*trained, *rest)
    answer = io.BytesIO()
    torch.save(trained, answer)
    return answer.getvalue()


def call_in_process(request):
    operator, arguments = torch.load(io.BytesIO(request))
    answer = io.BytesIO()
    torch.save(getattr(torch.ops.mmgen_kernels, operator).triton(*arguments), answer)
    return answer.getvalue()


def opcheck_in_process(operator, arguments):
    torch.library.opcheck(getattr(torch.ops.mmgen_kernels, operator).triton, arguments)


def prepare_process():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # poisons what `empty` returns, as conftest.py does
    warnings.simplefilter("ignore", RuntimeWarning)  # NaN and overflow in numpy
    repair_bf16()
    patch_once()


def patch_once():
    """Each call of a jit function makes the interpreter look through triton.language for what it has replaced already, 40 % of
    the time of these tests. Nothing is left to do where the first name of a module is replaced."""
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    look_through, names = interpreter._patch_builtin, {}

    def patch(package, builder, scope):
        if package not in names:
            names[package] = next((n for n, member in inspect.getmembers(package) if is_builtin(member)), None)
        if names[package] is not None and is_builtin(getattr(package, names[package])):
            look_through(package, builder, scope)

    interpreter._patch_builtin = patch


def rounded_to_bf16(values):
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    nearest = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)


def repair_bf16():
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def is_bf16(handle):
        return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16

    cast = InterpreterBuilder.cast_impl

    def repaired_cast(self, source, target):
        if is_bf16(source) and target.scalar == tl.float32:
            return TensorHandle((source.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        if target.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32:  # `other` of a load
            return TensorHandle(rounded_to_bf16(source.data), tl.bfloat16)
        if is_bf16(source) or target.scalar == tl.bfloat16:
            raise TypeError(f"interpreter: a cast from {source.dtype} to {target}")
        return cast(self, source, target)

    def refusing(operation):
        def guarded(self, *args):
            if any(is_bf16(a) for a in args):
                raise TypeError("interpreter: arithmetic on bf16; widen what is loaded")
            return operation(self, *args)

        return guarded

    dot = InterpreterBuilder.create_dot

    def repaired_dot(self, a, b, *rest):
        """Products of bf16 are exact in fp32."""
        return dot(self, *(cast_up(self, t) if is_bf16(t) else t for t in (a, b)), *rest)

    def cast_up(self, handle):
        return repaired_cast(self, handle, tl.float32)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = repaired_cast, repaired_dot
    for name in ("binary_op", "unary_op"):
        setattr(InterpreterBuilder, name, refusing(getattr(InterpreterBuilder, name)))
