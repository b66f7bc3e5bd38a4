"""mk.GaussianDiffusion and mk.create_diffusion."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mmgen_kernels.checks import check_choice
from mmgen_kernels.schedule.gaussian_diffusion import losses
from mmgen_kernels.schedule.gaussian_diffusion.kinds import LossType, ModelMeanType, ModelVarType, member
from mmgen_kernels.schedule.gaussian_diffusion.spacing import get_named_beta_schedule, space_timesteps, spaced_betas
from mmgen_kernels.schedule.gaussian_diffusion.steps import Kwargs, Limits, Model, Process, loop
from mmgen_kernels.schedule.gaussian_diffusion.tables import Tables
from mmgen_kernels.schedule.schedulers.noise import NOISES

Function = Callable[..., Tensor] | None
Shape = tuple[int, ...] | list[int]


class GaussianDiffusion:
    """Training and sampling of a diffusion model, by the calls of OpenAI's GaussianDiffusion and DiT's: an update is one operator.

    ``x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) z`` with a = cumprod(1 - betas); updates, losses and limits: docs/gaussian-diffusion.md.
    A model is called as ``model(x, t, **model_kwargs)`` with x (B, C, ...) and the t (B,) of the whole process, and returns
    (B, C, ...), or (B, 2 C, ...) where it learns variances.

    Args:
        betas: (T,), in (0, 1], T at least 2: an array, a list or a tensor.
        model_mean_type, model_var_type, loss_type: members of ModelMeanType, ModelVarType and LossType, of a script's own enums
            with the same names, or those names as strings: "epsilon", "learned_range", "mse".
        rescale_timesteps: the model is told ``t * 1000 / T`` as floats.
        use_timesteps: those of the process that sampling keeps, as SpacedDiffusion has it; None: all. t then counts these.
        noise: "torch" draws the noise of the scripts, the same bits from the same seed; "philox" draws keys from torch's generator,
            and the normals of sampling in registers.

    Attributes:
        num_timesteps; betas, alphas_cumprod, posterior_variance, ... as in the scripts, as fp64 tensors on the CPU.

    Raises:
        ValueError: an argument is none of these.

    Results are fp32 at least, as in the scripts, but for an x_0 that is the model's own output. Updates clamp a t outside of
    0 ... T - 1, where scripts raise.
    NaN: of an element stays with that element, in a loss with its sample.

    Source: Ho et al. 2020; Nichol and Dhariwal 2021; Song et al. 2021 (DDIM); Dhariwal and Nichol 2021 (classifier guidance).
    """

    def __init__(
        self,
        *,
        betas: Any,
        model_mean_type: Any,
        model_var_type: Any,
        loss_type: Any,
        rescale_timesteps: bool = False,
        use_timesteps: Iterable[int] | None = None,
        noise: str = "torch",
    ):
        self.model_mean_type = member("model_mean_type", ModelMeanType, model_mean_type)
        self.model_var_type = member("model_var_type", ModelVarType, model_var_type)
        self.loss_type = member("loss_type", LossType, loss_type)
        self.rescale_timesteps = rescale_timesteps
        check_choice("noise", noise, NOISES)
        betas = torch.as_tensor(betas, dtype=torch.float64, device="cpu")
        if betas.dim() != 1 or len(betas) < 2 or not bool(((betas > 0) & (betas <= 1)).all()):
            got = f"shape {tuple(betas.shape)}" + (f", {betas.min():.3g} to {betas.max():.3g}" if betas.numel() else "")
            raise ValueError(f"betas must be at least 2 numbers in (0, 1], got {got}")
        self.original_num_steps = len(betas)
        self.timestep_map = list(range(len(betas)))
        if use_timesteps is not None:
            betas, self.timestep_map = spaced_betas(betas, use_timesteps)
        self.num_timesteps = len(betas)
        times = torch.tensor(self.timestep_map)
        if rescale_timesteps:
            times = times.float() * (1000.0 / self.original_num_steps)
        as_it_is = not rescale_timesteps and self.num_timesteps == self.original_num_steps
        self.tables = t = Tables(betas, self.model_mean_type, self.model_var_type)
        self.process = Process(t, None if as_it_is else times, noise)
        self.betas, self.alphas_cumprod = t.betas, t.alphas_cumprod
        self.alphas_cumprod_prev, self.alphas_cumprod_next = t.alphas_cumprod_prev, t.alphas_cumprod_next
        self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod = t.alphas_cumprod.sqrt(), (1 - t.alphas_cumprod).sqrt()
        self.log_one_minus_alphas_cumprod = (1 - t.alphas_cumprod).log()
        self.sqrt_recip_alphas_cumprod = (1 / t.alphas_cumprod).sqrt()
        self.sqrt_recipm1_alphas_cumprod = (1 / t.alphas_cumprod - 1).sqrt()
        self.posterior_variance = t.posterior_variance
        self.posterior_log_variance_clipped = t.posterior_variance_clipped.log()
        self.posterior_mean_coef1, self.posterior_mean_coef2 = t.posterior_mean_coef1, t.posterior_mean_coef2

    # -- q ------------------------------------------------------------------------------------------------------------

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t of x_0 (B, C, ...) and t (B,), noise like x_start."""
        return self.process.noised(x_start, t, noise)[0]

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and its logarithm of x_t, given x_0; of x_start's shape."""
        dtype = torch.promote_types(x_start.dtype, torch.float32)
        root, variance, log = self.process.lookup("levels", t, x_start.dim(), dtype)
        return root * x_start, variance.expand(x_start.shape), log.expand(x_start.shape)

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and its clipped logarithm of x_{t-1}, given x_t and x_0."""
        (mean,) = self.process.step(self.tables, ("posterior_means",), [x_t, x_start], t, outputs=1)
        variance, log = self.process.lookup("posterior_variances", t, x_t.dim(), mean.dtype)
        return mean, variance.expand(x_t.shape), log.expand(x_t.shape)

    # -- p ------------------------------------------------------------------------------------------------------------

    def p_mean_variance(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Function = None,
        model_kwargs: Kwargs = None,
    ) -> dict[str, Any]:
        """What the model makes of x_{t-1}: mean, variance, log_variance, pred_xstart; "extra" is what it returns besides."""
        output, extra = self.ask(model, x, t, model_kwargs)
        m, v = self.process.split(x, output)
        mean, clean = self.process.means(x, m, t, Limits(clip_denoised, denoised_fn))
        variance, log_variance = self.process.variances(x, t, v)
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": clean, "extra": extra}

    def ask(self, model: Model, x: Tensor, t: Tensor, model_kwargs: Kwargs) -> tuple[Tensor, Any]:
        """The model's output, and what it returns besides."""
        output = model(x, self.process.told(t), **(model_kwargs or {}))
        return output if isinstance(output, tuple) else (output, None)

    def condition_mean(
        self, cond_fn: Callable[..., Tensor], p_mean_var: dict[str, Tensor], x: Tensor, t: Tensor, model_kwargs: Kwargs = None
    ) -> Tensor:
        """The mean, moved by the variance times ``cond_fn(x, t)``, a gradient of log p(y | x)."""
        gradient = self.process.gradient(cond_fn, x, t, model_kwargs).float()
        return torch.addcmul(p_mean_var["mean"].float(), p_mean_var["variance"].float(), gradient)

    def condition_score(
        self, cond_fn: Callable[..., Tensor], p_mean_var: dict[str, Tensor], x: Tensor, t: Tensor, model_kwargs: Kwargs = None
    ) -> dict[str, Tensor]:
        """p_mean_var as if the score had the gradient of log p(y | x) in it, "pred_xstart" and "mean" changed."""
        gradient = self.process.gradient(cond_fn, x, t, model_kwargs)
        asked = ("ddim", 0.0, True)
        clean = self.process.step(self.process.of_data, asked, [x, p_mean_var["pred_xstart"], gradient], t)[1]
        return p_mean_var | {"pred_xstart": clean, "mean": self.q_posterior_mean_variance(clean, x, t)[0]}

    def p_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Function = None,
        cond_fn: Function = None,
        model_kwargs: Kwargs = None,
    ) -> dict[str, Tensor]:
        """One ancestral step: "sample", x_{t-1}, and "pred_xstart".

        Args:
            x: (B, C, ...), x_t.
            t: (B,), int64.
            clip_denoised: the predicted x_0 is clamped to [-1, 1], after `denoised_fn` has had it.
            cond_fn: ``cond_fn(x, t, **model_kwargs)``, a gradient of log p(y | x), which the variance times moves the mean.
        """
        m, v = self.process.split(x, self.ask(model, x, t, model_kwargs)[0])
        z = self.process.draw(x)
        gradient = self.process.gradient(cond_fn, x, t, model_kwargs)
        sample, clean = self.process.ancestral(x, m, t, z, v, Limits(clip_denoised, denoised_fn), gradient)
        return {"sample": sample, "pred_xstart": clean}

    def p_sample_loop_progressive(
        self,
        model: Model,
        shape: Shape,
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Function = None,
        cond_fn: Function = None,
        model_kwargs: Kwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
    ) -> Iterator[dict[str, Tensor]]:
        """What `p_sample` returns, from noise (T - 1) down to 0. device: the model's, if None; progress: a bar of tqdm."""
        options = {"denoised_fn": denoised_fn, "cond_fn": cond_fn, "model_kwargs": model_kwargs, "clip_denoised": clip_denoised}
        yield from loop(self.p_sample, self.num_timesteps, model, shape, noise, device, progress, **options)

    def p_sample_loop(self, model: Model, shape: Shape, *args: Any, **kwargs: Any) -> Tensor:
        """The last sample of `p_sample_loop_progressive`, whose arguments it takes."""
        return last(self.p_sample_loop_progressive(model, shape, *args, **kwargs))

    # -- ddim ---------------------------------------------------------------------------------------------------------

    def ddim_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Function = None,
        cond_fn: Function = None,
        model_kwargs: Kwargs = None,
        eta: float = 0.0,
    ) -> dict[str, Tensor]:
        """One step of DDIM; arguments and result as `p_sample`. eta: 0 is deterministic, 1 draws as much noise as `p_sample`."""
        m, _ = self.process.split(x, self.ask(model, x, t, model_kwargs)[0])
        gradient = self.process.gradient(cond_fn, x, t, model_kwargs)
        z = self.process.draw(x)
        sample, clean = self.process.ddim(x, m, t, z, eta, Limits(clip_denoised, denoised_fn), gradient)
        return {"sample": sample, "pred_xstart": clean}

    def ddim_reverse_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Function = None,
        cond_fn: Function = None,
        model_kwargs: Kwargs = None,
        eta: float = 0.0,
    ) -> dict[str, Tensor]:
        """One step of DDIM towards noise: "sample" is x_{t+1}. eta must be 0."""
        if eta != 0:
            raise ValueError(f"eta must be 0, the way back of a deterministic step, got {eta}")
        m, _ = self.process.split(x, self.ask(model, x, t, model_kwargs)[0])
        gradient = self.process.gradient(cond_fn, x, t, model_kwargs)
        sample, clean = self.process.ddim(x, m, t, None, 0.0, Limits(clip_denoised, denoised_fn), gradient, reverse=True)
        return {"sample": sample, "pred_xstart": clean}

    def ddim_sample_loop_progressive(
        self,
        model: Model,
        shape: Shape,
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Function = None,
        cond_fn: Function = None,
        model_kwargs: Kwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> Iterator[dict[str, Tensor]]:
        """What `ddim_sample` returns, from noise (T - 1) down to 0; arguments as `p_sample_loop_progressive`."""
        options = {"denoised_fn": denoised_fn, "cond_fn": cond_fn, "model_kwargs": model_kwargs, "clip_denoised": clip_denoised}
        yield from loop(self.ddim_sample, self.num_timesteps, model, shape, noise, device, progress, eta=eta, **options)

    def ddim_sample_loop(self, model: Model, shape: Shape, *args: Any, **kwargs: Any) -> Tensor:
        """The last sample of `ddim_sample_loop_progressive`, whose arguments it takes."""
        return last(self.ddim_sample_loop_progressive(model, shape, *args, **kwargs))

    # -- losses -------------------------------------------------------------------------------------------------------

    def training_losses(
        self, model: Model, x_start: Tensor, t: Tensor, model_kwargs: Kwargs = None, noise: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The loss of each sample, "loss" (B,); of loss types MSE also "mse" and, where variances are learned, "vb".

        Args:
            x_start: (B, C, ...), x_0.
            t: (B,), int64.
            noise: like x_start; drawn if None.
        """
        x_t, noise = self.process.noised(x_start, t, noise)
        output, _ = self.ask(model, x_t, t, model_kwargs)
        self.process.split(x_t, output)  # which refuses what has not the channels
        return losses.training(self.process, self.loss_type, output, x_start, x_t, t, noise)

    def calc_bpd_loop(
        self, model: Model, x_start: Tensor, clip_denoised: bool = True, model_kwargs: Kwargs = None
    ) -> dict[str, Tensor]:
        """The variational bound on x_start's negative log likelihood, in bits per dimension.

        Returns:
            "total_bpd" and "prior_bpd" (B,); from the last timestep to the first, (B, T): "vb", the terms of the bound,
            "xstart_mse" and "mse", the mean squares of the errors of x_0 and of the noise.
        """
        found: list[tuple[Tensor, ...]] = []
        for i in range(self.num_timesteps - 1, -1, -1):
            t = torch.full((len(x_start),), i, device=x_start.device)
            x_t, noise = self.process.noised(x_start, t, None)
            with torch.no_grad():
                output, _ = self.ask(model, x_t, t, model_kwargs)
                found.append(losses.bpd_terms(self.process, output, x_start, x_t, t, noise, clip_denoised))
        vb, xstart_mse, mse = (torch.stack(of, dim=1) for of in zip(*found, strict=True))
        prior = losses.prior_bpd(self.q_mean_variance(x_start, t.new_full(t.shape, self.num_timesteps - 1)))
        return {"total_bpd": vb.sum(1) + prior, "prior_bpd": prior, "vb": vb, "xstart_mse": xstart_mse, "mse": mse}


def last(steps: Iterator[dict[str, Tensor]]) -> Tensor:
    for out in steps:
        sample = out["sample"]
    return sample


def create_diffusion(
    timestep_respacing: str | Sequence[int] | None,
    noise_schedule: str = "linear",
    use_kl: bool = False,
    sigma_small: bool = False,
    predict_xstart: bool = False,
    learn_sigma: bool = True,
    rescale_learned_sigmas: bool = False,
    diffusion_steps: int = 1000,
    *,
    noise: str = "torch",
) -> GaussianDiffusion:
    """A `GaussianDiffusion` by the arguments of DiT's scripts.

    Args:
        timestep_respacing: how many of the timesteps are kept: "" or None all; "250", "10,15,20" or [10, 15, 20] so many of each
            section; "ddim50" so many at a whole stride.
        noise_schedule: "linear" or "squaredcos_cap_v2" ("cosine").
        use_kl: the loss is the variational bound, times T.
        sigma_small: of variances that are not learned, the lower bound, not beta.
        predict_xstart: the model predicts x_0, not the noise.
        learn_sigma: the model has twice the channels, and says the variance by the second half.
        rescale_learned_sigmas: the bound beside the mean square is weighed by T / 1000.
        diffusion_steps: of the whole process.
        noise: as of `GaussianDiffusion`.

    Returns:
        GaussianDiffusion: of the timesteps that are kept.

    Raises:
        ValueError: naming the argument.

    NaN: as in `GaussianDiffusion`.

    Source: Nichol and Dhariwal 2021, Improved Denoising Diffusion Probabilistic Models, sections 3 and 4; Peebles and Xie 2022.
    """
    fixed = ModelVarType.FIXED_SMALL if sigma_small else ModelVarType.FIXED_LARGE
    squares = LossType.RESCALED_MSE if rescale_learned_sigmas else LossType.MSE
    return GaussianDiffusion(
        betas=get_named_beta_schedule(noise_schedule, diffusion_steps),
        model_mean_type=ModelMeanType.START_X if predict_xstart else ModelMeanType.EPSILON,
        model_var_type=ModelVarType.LEARNED_RANGE if learn_sigma else fixed,
        loss_type=LossType.RESCALED_KL if use_kl else squares,
        use_timesteps=space_timesteps(diffusion_steps, timestep_respacing) if timestep_respacing else None,
        noise=noise,
    )
