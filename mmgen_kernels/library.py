"""How a schema becomes a torch operator: implementations, fake, autograd and vmap are wired here, once, for all families.

`define` takes two schemas, forward and backward, and wires autograd *by the names in them*. An argument of the backward is

    grad_<output>       the gradient of that output of the forward (None where it has none)
    need_grad_<input>   whether that input wants a gradient
    needs               bool[]: the same of all inputs that have one, in the order of the results
    <input>_shape       the sizes of that input (when only its sizes are needed, it is not kept alive)
    anything else       the input or output of the forward that bears this name, saved by the forward

and a result `grad_<input>` is the gradient of that input; one that bears the name of an output is that, computed again for whoever
calls the backward by its name; an input that `passed_on` names has the gradient of an output as its own,
uncopied. No family writes an autograd.Function.

Measured costs and why it is done this way rather than with `torch.library.custom_op`: docs/design.md.
"""

from __future__ import annotations

import functools
import importlib
import operator as python
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as functorch_is_active
from torch._C import _AutoDispatchBelowAutograd as BelowAutograd
from torch._C import _DisableAutocast as NoAutocast
from torch._C._functorch import unwrap_if_dead

NAMESPACE = "mmgen_kernels"
INLINE = "inline"  # no implementation: compiled code is to see the reference itself
COMPOSED = "composed"  # of an operator that calls others, each of which has implementations of its own
LIBRARY = torch.library.Library(NAMESPACE, "DEF")  # lives as long as the process
OPERATORS: dict[str, Operator] = {}


class Operator:
    """One registered operator and its overloads, one overload per implementation.

    `torch.ops.mmgen_kernels.<name>` (the default overload) runs what serves the tensor's device best: the C++ kernel on
    CPU where it was built, else the reference. `.reference` and one overload per lazily imported launcher name an
    implementation outright, so that a compiled graph shows what it runs.
    """

    def __init__(self, schema: str, reference: Callable, fake: Callable, launchers: dict[str, str], vmap: Callable | None):
        parsed = torch._C.parse_schema(f"{NAMESPACE}::{schema}")
        self.name = parsed.name.removeprefix(f"{NAMESPACE}::")
        self.inputs = [a.name for a in parsed.arguments]
        self.outputs = [r.name for r in parsed.returns]
        self.tensors = [i for i, a in enumerate(parsed.arguments) if str(a.type) in ("Tensor", "Optional[Tensor]")]
        self.written = [i for i, a in enumerate(parsed.arguments) if a.alias_info is not None and a.alias_info.is_write]
        self.defaults = tuple(a.default_value for a in parsed.arguments)  # None where there is none
        self.reference, self.fake, self.launchers = reference, fake, launchers
        self.parts: tuple[Operator, ...] = ()  # the operators that it calls
        self.backward: Operator | None = None
        # Set by `wire`, each from a tuple to the part of it that is wanted:
        self.saved: Callable[[Sequence], tuple]  # of inputs and outputs, the tensors that the backward wants
        self.plain: Callable[[Sequence], tuple]  # and what else it wants of them
        self.shaped: list[int] = []  # the inputs whose sizes it wants
        self.arguments: Callable[[Sequence], tuple]  # of what `gradients` has, in the order of the backward's schema
        self.wanted: Callable[[Sequence], tuple]  # of the inputs, those that `needs` speaks of
        self.gradient_of: list[int] = []  # of each input, in (None, *results, *upstream gradients)
        self.overloads: dict[str, Any] = {}
        self.has_cpp = False  # set once the C++ part is loaded: a plain attribute, which Dynamo can guard

        signature = schema[schema.index("(") :]
        if any(a.has_default_value() for a in parsed.arguments):  # which torch leaves out of calls of Python
            fake = self.of_all(fake)
        for overload in ("default", "reference", *launchers):
            qualified = self.name if overload == "default" else f"{self.name}.{overload}"
            LIBRARY.define(qualified + signature, tags=(torch.Tag.pt2_compliant_tag,))
            kernel = _import_launcher(launchers[overload]) if overload in launchers else reference
            LIBRARY.impl(qualified, self.python_kernel(kernel), "CompositeExplicitAutograd")
            self.overloads[overload] = getattr(getattr(getattr(torch.ops, NAMESPACE), self.name), overload)
            torch.library.register_fake(self.overloads[overload], fake, lib=LIBRARY)
            # the rule calls the very overload that was called, or vmap would undo the choice of implementation
            rule = functools.partial(vmap or functools.partial(vmap_by_loop, self), self.overloads[overload])
            torch.library.register_vmap(self.overloads[overload], rule, lib=LIBRARY)
        self.overloads["cpp"] = self.overloads[COMPOSED] = self.overloads["default"]
        OPERATORS[self.name] = self

    def __call__(self, implementation: str, *args: Any) -> Any:
        """Runs the operator by the cheapest road that is right: see the table in docs/design.md.

        The last arguments may be left out where the schema has defaults: one that is passed costs 0.1 us, whatever it is.
        """
        if torch.compiler.is_compiling():
            return self.reference(*self.filled(args)) if implementation == INLINE else self.overloads[implementation](*args)
        overload = self.overloads[implementation]
        if functorch_is_active():
            return overload(*args) if self.backward is None else _Functorch.apply(self, implementation, *self.filled(args))
        if self.backward is not None and torch.is_grad_enabled():
            given = len(args)
            for i in self.tensors:
                if i < given and args[i] is not None and args[i].requires_grad:
                    args = self.filled(args)
                    return _apply_eager(self, implementation, *[unwrap_if_dead(a) if isinstance(a, Tensor) else a for a in args])
        with BelowAutograd():
            output = overload(*args)
        for i in self.written:  # below autograd nobody else tells it that what it may have saved is no longer there
            torch.autograd.graph.increment_version(args[i])
        return output

    def filled(self, args: tuple) -> tuple:
        return args if len(args) == len(self.defaults) else (*args, *self.defaults[len(args) :])

    def of_all(self, function: Callable) -> Callable:
        """The function, called without its last arguments, with their defaults."""
        return lambda *args: function(*self.filled(args))

    def python_kernel(self, function: Callable) -> Callable:
        """One written in Python must record no autograd, must not be cast by autocast, and returns what the fake says: dense."""

        def kernel(*args):
            with BelowAutograd(), NoAutocast():
                output = function(*self.filled(args))
            if output is None:  # of an operator that writes its arguments
                return None
            return tuple(o.contiguous() for o in output) if isinstance(output, tuple) else output.contiguous()

        return kernel

    # -- autograd by names --------------------------------------------------------------------------------------------

    def wire(self, backward: Operator, passed_on: dict[str, str]) -> None:
        """Resolves every argument of the backward to its source, and registers autograd for each overload.

        What a name means is found out here, once: a step of a small model makes thousands of calls.
        """
        known = [*self.inputs, *self.outputs]
        tensors = {*self.tensors, *range(len(self.inputs), len(known))}
        kinds: dict[str, list[int]] = {"gradient": [], "needed": [], "saved": [], "plain": [], "shape": [], "needs": []}
        sources: list[tuple[str, int]] = []
        for name in backward.inputs:
            if name == "needs":  # a schema has room for 64 arguments
                kind, of = "needs", 0
            elif name.startswith("grad_") and name[5:] in self.outputs:
                kind, of = "gradient", self.outputs.index(name[5:])
            elif name.startswith("need_grad_") and name[10:] in self.inputs:
                kind, of = "needed", self.inputs.index(name[10:])
            elif name.endswith("_shape") and name[:-6] in self.inputs:
                kind, of = "shape", self.inputs.index(name[:-6])
            elif name in known:
                of = known.index(name)
                kind = "saved" if of in tensors else "plain"
            else:
                raise ValueError(f"{backward.name}: argument {name!r} names nothing of {self.name}")
            if kind in ("saved", "plain", "shape"):
                kinds[kind].append(of)
                of = len(kinds[kind]) - 1
            sources.append((kind, of))
        if unknown := [r for r in backward.outputs if r.removeprefix("grad_") not in self.inputs and r not in self.outputs]:
            raise ValueError(f"{backward.name}: results {unknown} are neither grad_<input of {self.name}> nor an output of it")
        begin, at = {}, 0  # `gradients` has these one after the other
        for kind, count in (
            ("gradient", len(self.outputs)),
            ("needed", len(self.inputs)),
            ("saved", len(kinds["saved"])),
            ("plain", len(kinds["plain"])),
            ("shape", len(kinds["shape"])),
            ("needs", 1),
        ):
            begin[kind], at = at, at + count
        self.saved, self.plain, self.shaped = picker(kinds["saved"]), picker(kinds["plain"]), kinds["shape"]
        self.arguments = picker([begin[kind] + of for kind, of in sources])
        of_inputs = [result.removeprefix("grad_") for result in backward.outputs if result not in self.outputs]
        self.wanted = picker([self.inputs.index(name) for name in of_inputs])
        places = {result: 1 + i for i, result in enumerate(backward.outputs)}
        places |= {f"grad_{name}": 1 + len(backward.outputs) + self.outputs.index(of) for name, of in passed_on.items()}
        self.gradient_of = [places.get(f"grad_{name}", 0) for name in self.inputs]
        self.backward = backward
        for implementation, overload in self.overloads.items():
            if implementation in ("cpp", COMPOSED):  # aliases of the default overload
                continue
            torch.library.register_autograd(
                overload,
                functools.partial(self.gradients, backward.overloads[implementation]),
                setup_context=self.save,
                lib=LIBRARY,
            )
            torch.library.register_autograd(backward.overloads[implementation], backward.refuse_double_backward, lib=LIBRARY)

    def save(self, ctx: Any, inputs: tuple, output: Any) -> None:
        """Keeps for the backward what its schema names: tensors as saved tensors, the rest as plain attributes."""
        known = (*inputs, *output) if isinstance(output, tuple) else (*inputs, output)
        ctx.save_for_backward(*self.saved(known))
        ctx.rest = (*self.plain(known), *[list(inputs[i].shape) for i in self.shaped])
        ctx.set_materialize_grads(False)

    def gradients(self, call: Callable, ctx: Any, *grads: Tensor | None) -> tuple:
        """Calls the backward with arguments found by name; returns one gradient (or None) per input of the forward."""
        # The two leading arguments of the Function classes below are not inputs of the operator. Where there are fewer than those,
        # the last were left out, and want none.
        asked = ctx.needs_input_grad[-len(self.inputs) :]
        needed = (*asked, *[False] * (len(self.inputs) - len(asked)))
        upstream = [None if is_placeholder(grad) else grad for grad in grads]
        results = call(*self.arguments((*upstream, *needed, *ctx.saved_tensors, *ctx.rest, list(self.wanted(needed)))))
        known = (None, *results, *grads) if isinstance(results, tuple) else (None, results, *grads)
        return tuple([known[of] if need else None for of, need in zip(self.gradient_of, asked, strict=False)])

    def refuse_double_backward(self, ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"{NAMESPACE}: {self.name} has no derivative; the operator is differentiable once")


class _Eager(torch.autograd.Function):
    """The fast road in eager mode. The form without setup_context costs 12 us less per call."""

    @staticmethod
    def forward(ctx, operator, implementation, *args):
        with BelowAutograd():
            output = operator.overloads[implementation](*args)
        operator.save(ctx, args, output)
        ctx.operator, ctx.implementation = operator, implementation
        return output

    @staticmethod
    def backward(ctx, *grads):
        call = ctx.operator.backward.overloads[ctx.implementation]
        if not torch.is_grad_enabled():  # with create_graph=True the registered autograd of the backward raises if it is used
            call = functools.partial(_call_below_autograd, call)
        return None, None, *ctx.operator.gradients(call, ctx, *grads)


def _call_below_autograd(call: Callable, *args: Any) -> Any:
    """Only the call: saved tensors are unpacked before, as a checkpoint then runs its forward again and must record it."""
    with BelowAutograd():
        return call(*args)


class _Functorch(torch.autograd.Function):
    """torch.func transforms want setup_context, and refuse what register_autograd makes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(operator, implementation, *args):
        return operator.overloads[implementation](*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.operator, ctx.implementation, *args = inputs
        if ctx.operator.backward is not None:
            ctx.operator.save(ctx, tuple(args), output)

    @staticmethod
    def backward(ctx, *grads):
        if ctx.operator.backward is None:
            ctx.operator.refuse_double_backward(ctx)
        call = functools.partial(_Functorch.apply, ctx.operator.backward, ctx.implementation)
        return None, None, *ctx.operator.gradients(call, ctx, *grads)


# What Function.apply does where no transform is active, but for the look at each argument's type, which costs 3 us.
_apply_eager = super(torch.autograd.Function, _Eager).apply


def picker(indices: Sequence[int]) -> Callable[[Sequence], tuple]:
    """The function that takes the elements with these indices out of a tuple."""
    if len(indices) > 1:
        return python.itemgetter(*indices)
    return lambda sequence: tuple([sequence[i] for i in indices])


def is_placeholder(grad: Tensor | None) -> bool:
    """Whether it is the gradient of an output that nobody asked for, as who sums up all outputs has it (opcheck does)."""
    return grad is not None and grad.dim() == 1 and grad.shape[0] == 0


def _import_launcher(path: str) -> Callable:
    """'package.module:function', imported at the first call: importing mmgen_kernels needs neither Triton nor a GPU."""

    def launcher(*args):
        module, function = path.split(":")
        return getattr(importlib.import_module(module), function)(*args)

    return launcher


def vmap_by_loop(operator: Operator, call: Callable, info: Any, in_dims: tuple, *args: Any) -> tuple:
    """The rule of operators that bring none: one call per sample, stacked. Right for every operator, fast for none."""
    if alone := [operator.inputs[i] for i in operator.written if not isinstance(in_dims[i], int)]:
        raise ValueError(f"{NAMESPACE}: {operator.name} writes {', '.join(alone)}, which must be batched too under vmap")
    calls = []
    for sample in range(info.batch_size):
        calls.append(call(*[a.select(d, sample) if isinstance(d, int) else a for a, d in zip(args, in_dims, strict=True)]))
    if not operator.outputs:
        return None, None
    if isinstance(calls[0], tuple):
        return tuple(torch.stack(o) for o in zip(*calls, strict=True)), (0,) * len(calls[0])
    return torch.stack(calls), 0


def define(
    forward: str,
    *,
    reference: Callable,
    fake: Callable,
    backward: str | None = None,
    backward_reference: Callable | None = None,
    backward_fake: Callable | None = None,
    passed_on: dict[str, str] | None = None,
    launchers: dict[str, tuple[str, str] | str] | None = None,
    vmap: Callable | None = None,
    parts: tuple[Operator, ...] = (),
) -> Operator:
    """Registers an operator, and its backward if it has one.

    Args:
        forward, backward: schemas without namespace; every argument and every result of them bears a name. A forward may write
            arguments, ``Tensor(a!) codebook``, and then returns nothing and has no backward.
        reference, backward_reference: plain PyTorch with the schema's signature; serves every device without a kernel.
        fake, backward_fake: the shapes, dtypes and memory formats of the results.
        passed_on: input -> the output whose gradient is that input's too, such as x of x + y.
        launchers: implementation -> "module:function" (a pair, forward and backward, where there is a backward).
        vmap: rule (call, info, in_dims, *args) -> (output, out_dims) of the forward, where a loop over samples is too slow;
            `call` is the overload to be called.
        parts: of an operator composed of others, those. It is called as COMPOSED, and each part runs by what serves it best.
    """
    launchers = launchers or {}
    pairs = {name: (path, "") if isinstance(path, str) else path for name, path in launchers.items()}
    operator = Operator(forward, reference, fake, {n: p[0] for n, p in pairs.items()}, vmap)
    if backward is not None:
        assert backward_reference is not None and backward_fake is not None
        derivative = Operator(backward, backward_reference, backward_fake, {n: p[1] for n, p in pairs.items()}, None)
        operator.wire(derivative, passed_on or {})
        derivative.parts = tuple(part.backward for part in parts if part.backward is not None)
    operator.parts = parts
    return operator
