"""Cases of the family."""

from mmgen_kernels.battery.modulation import adaln, gate_residual, seam

CASES = [*adaln.CASES, *gate_residual.CASES, *seam.CASES]
