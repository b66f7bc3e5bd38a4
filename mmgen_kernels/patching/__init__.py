"""The drop-in: faster forwards for modules of libraries that other people wrote, on instances only, and reversible."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mmgen_kernels.patching import (
    diffusers,
    diffusers_blocks,
    diffusers_joint_blocks,
    diffusers_lumina_blocks,
    diffusers_normalization,
    dit,
    llamagen,
    taming,
    vector_quantize_pytorch,
)
from mmgen_kernels.patching.handle import Handle, Kept, Replaced, patch_with
from mmgen_kernels.patching.rule import Forward, Rule

__all__ = ["RULES", "Forward", "Handle", "Kept", "Replaced", "Rule", "patch"]

# The first that recognises a module speaks for it: those that go by a package's name come before those that go by structure.
RULES: tuple[Rule, ...] = (
    vector_quantize_pytorch.ResidualVQRule(),
    vector_quantize_pytorch.VectorQuantizeRule(),
    diffusers.VectorQuantizerRule(),
    taming.VectorQuantizer2Rule(),
    llamagen.VectorQuantizerRule(),
    *diffusers_blocks.RULES,
    *diffusers_joint_blocks.RULES,
    *diffusers_lumina_blocks.RULES,
    *diffusers_normalization.RULES,
    *dit.RULES,
)


def patch(
    object: Any,
    *,
    families: str | Iterable[str] | None = None,
    verify: bool = True,
    strict: bool = False,
    noise: str = "torch",
) -> Handle:
    """Replaces forwards of modules, and steps and losses of schedulers and diffusions, by fused ones, on these instances only.

    Parameters, buffers, state_dict, hooks, classes and other instances stay as they are. Which modules of which libraries
    are served, what is not, and how the result differs from stock in rounding: docs/drop-in.md.

    Args:
        object: a module, a diffusers scheduler or a script's GaussianDiffusion, or a list, tuple or mapping of them, or an object
            with such attributes (a pipeline).
        families: which families of operators may be used, such as "vq" or "modulation"; None means all.
        verify: compares each kind of module with the stock one first, on copies and once per process: outputs, gradients and
            buffers of two training steps and one call in eval mode. What differs by more than rounding is kept as it is.
        noise: of schedulers and diffusions: "torch" draws what stock draws, the same bits from the same generator; "philox" draws
            in registers, from a key that each run of a scheduler draws once, or each call of a diffusion.
        strict: raises if nothing is served, or a module that a rule knows is not; then nothing is replaced.

    Returns:
        Handle: ``.report()``, ``.replaced``, ``.kept``, ``.revert()``; as a context manager it reverts on exit.

    Raises:
        TypeError: object holds neither module nor scheduler, or verify or strict is no bool.
        ValueError: families names an unknown family, or noise is neither.
        RuntimeError: strict, with the report.

    NaN: a NaN row takes index 0 and a NaN code is never chosen, as in `nearest_code`; stock code may choose NaN codes.
    """
    return patch_with(RULES, object, families=families, verify=verify, strict=strict, noise=noise)
