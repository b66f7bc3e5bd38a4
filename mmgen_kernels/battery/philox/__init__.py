"""Cases of the streams philox_integers, philox_uniform and philox_normal, and of fold_in."""

from mmgen_kernels.battery.philox import fold_in, streams

CASES = [*streams.CASES, *fold_in.CASES]
