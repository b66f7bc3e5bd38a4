"""Cases of scheduler_step, guidance and add_noise, and of their backwards."""

from mmgen_kernels.battery.schedule import add_noise, guidance, scheduler_step

CASES = [*scheduler_step.CASES, *guidance.CASES, *add_noise.CASES]
