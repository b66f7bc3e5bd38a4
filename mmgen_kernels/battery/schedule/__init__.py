"""Cases of the family's operators and of their backwards."""

from mmgen_kernels.battery.schedule import add_noise, diffusion_loss, discrete, discrete_loss, guidance, hybrid_loss, scheduler_step

CASES = [
    *scheduler_step.CASES,
    *guidance.CASES,
    *add_noise.CASES,
    *diffusion_loss.CASES,
    *hybrid_loss.CASES,
    *discrete.CASES,
    *discrete_loss.CASES,
]
