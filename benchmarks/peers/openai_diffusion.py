"""Diffusion as scripts in the line of OpenAI's improved-diffusion have it, in plain PyTorch: tables in numpy, from which each call
sends a device what it wants of them, and a coefficient as large as the sample for each product.

The scripts' `precision` is float32. With float64 the same formulas are an oracle.
"""

from __future__ import annotations

import enum
import math

import numpy as np
import torch

ModelMeanType = enum.Enum("ModelMeanType", "PREVIOUS_X START_X EPSILON")
ModelVarType = enum.Enum("ModelVarType", "LEARNED FIXED_SMALL FIXED_LARGE LEARNED_RANGE")
LossType = enum.Enum("LossType", "MSE RESCALED_MSE KL RESCALED_KL")


def of_timesteps(table, t, like, precision):
    """A number for each sample, as large as the sample."""
    numbers = torch.from_numpy(table).to(device=t.device)[t].to(precision)
    return numbers.view(-1, *[1] * (like.dim() - 1)) + torch.zeros(like.shape, device=t.device, dtype=precision)


def mean_of_samples(x):
    return x.mean(dim=list(range(1, x.dim())))


class GaussianDiffusion:
    precision = torch.float32

    def __init__(self, *, betas, model_mean_type, model_var_type, loss_type, rescale_timesteps=False):
        self.model_mean_type, self.model_var_type, self.loss_type = model_mean_type, model_var_type, loss_type
        self.rescale_timesteps = rescale_timesteps
        self.betas = betas = np.asarray(betas, dtype=np.float64)
        self.num_timesteps = len(betas)
        self.alphas_cumprod = signal = np.cumprod(1 - betas)
        self.alphas_cumprod_prev, self.alphas_cumprod_next = np.append(1.0, signal[:-1]), np.append(signal[1:], 0.0)
        self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod = np.sqrt(signal), np.sqrt(1 - signal)
        self.log_one_minus_alphas_cumprod = np.log(1 - signal)
        self.sqrt_recip_alphas_cumprod, self.sqrt_recipm1_alphas_cumprod = np.sqrt(1 / signal), np.sqrt(1 / signal - 1)
        self.posterior_variance = betas * (1 - self.alphas_cumprod_prev) / (1 - signal)
        self.posterior_log_variance_clipped = np.log(np.append(self.posterior_variance[1], self.posterior_variance[1:]))
        self.posterior_mean_coef1 = betas * np.sqrt(self.alphas_cumprod_prev) / (1 - signal)
        self.posterior_mean_coef2 = (1 - self.alphas_cumprod_prev) * np.sqrt(1 - betas) / (1 - signal)

    def at(self, table, t, like):
        return of_timesteps(table, t, like, self.precision)

    def _scale_timesteps(self, t):
        return t.float() * (1000.0 / self.num_timesteps) if self.rescale_timesteps else t

    def q_mean_variance(self, x_start, t):
        mean = self.at(self.sqrt_alphas_cumprod, t, x_start) * x_start
        return mean, self.at(1 - self.alphas_cumprod, t, x_start), self.at(self.log_one_minus_alphas_cumprod, t, x_start)

    def q_sample(self, x_start, t, noise=None):
        noise = torch.randn_like(x_start) if noise is None else noise
        signal, spread = self.at(self.sqrt_alphas_cumprod, t, x_start), self.at(self.sqrt_one_minus_alphas_cumprod, t, x_start)
        return signal * x_start + spread * noise

    def q_posterior_mean_variance(self, x_start, x_t, t):
        of_data, of_sample = self.at(self.posterior_mean_coef1, t, x_t), self.at(self.posterior_mean_coef2, t, x_t)
        variance, log = self.at(self.posterior_variance, t, x_t), self.at(self.posterior_log_variance_clipped, t, x_t)
        return of_data * x_start + of_sample * x_t, variance, log

    def p_mean_variance(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        output = model(x, self._scale_timesteps(t), **(model_kwargs or {}))
        learned = self.model_var_type.name.startswith("LEARNED")
        output, values = torch.split(output, x.shape[1], dim=1) if learned else (output, None)
        if self.model_var_type.name == "LEARNED":
            log = values
            variance = log.exp()
        elif learned:
            share = (values + 1) / 2
            log = share * self.at(np.log(self.betas), t, x) + (1 - share) * self.at(self.posterior_log_variance_clipped, t, x)
            variance = log.exp()
        elif self.model_var_type.name == "FIXED_LARGE":
            large = np.append(self.posterior_variance[1], self.betas[1:])
            variance, log = self.at(large, t, x), self.at(np.log(large), t, x)
        else:
            variance, log = self.at(self.posterior_variance, t, x), self.at(self.posterior_log_variance_clipped, t, x)
        kind = self.model_mean_type.name
        if kind == "EPSILON":
            clean = self._predict_xstart_from_eps(x, t, output)
        elif kind == "START_X":
            clean = output
        else:
            ratio = self.at(self.posterior_mean_coef2 / self.posterior_mean_coef1, t, x)
            clean = self.at(1 / self.posterior_mean_coef1, t, x) * output - ratio * x
        clean = clean if denoised_fn is None else denoised_fn(clean)
        clean = clean.clamp(-1, 1) if clip_denoised else clean
        mean = output if kind == "PREVIOUS_X" else self.q_posterior_mean_variance(clean, x, t)[0]
        return {"mean": mean, "variance": variance, "log_variance": log, "pred_xstart": clean}

    def _predict_xstart_from_eps(self, x_t, t, eps):
        return self.at(self.sqrt_recip_alphas_cumprod, t, x_t) * x_t - self.at(self.sqrt_recipm1_alphas_cumprod, t, x_t) * eps

    def _predict_eps_from_xstart(self, x_t, t, pred_xstart):
        away = self.at(self.sqrt_recip_alphas_cumprod, t, x_t) * x_t - pred_xstart
        return away / self.at(self.sqrt_recipm1_alphas_cumprod, t, x_t)

    def condition_mean(self, cond_fn, p_mean_var, x, t, model_kwargs=None):
        gradient = cond_fn(x, self._scale_timesteps(t), **(model_kwargs or {}))
        return p_mean_var["mean"] + p_mean_var["variance"] * gradient

    def condition_score(self, cond_fn, p_mean_var, x, t, model_kwargs=None):
        gradient = cond_fn(x, self._scale_timesteps(t), **(model_kwargs or {}))
        eps = self._predict_eps_from_xstart(x, t, p_mean_var["pred_xstart"])
        eps = eps - (1 - self.at(self.alphas_cumprod, t, x)).sqrt() * gradient
        clean = self._predict_xstart_from_eps(x, t, eps)
        return p_mean_var | {"pred_xstart": clean, "mean": self.q_posterior_mean_variance(clean, x, t)[0]}

    def p_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None):
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        noise = torch.randn_like(x)
        later = (t != 0).to(self.precision).view(-1, *[1] * (x.dim() - 1))
        if cond_fn is not None:
            out["mean"] = self.condition_mean(cond_fn, out, x, t, model_kwargs)
        return {"sample": out["mean"] + later * torch.exp(0.5 * out["log_variance"]) * noise, "pred_xstart": out["pred_xstart"]}

    def ddim_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None, eta=0.0):
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        if cond_fn is not None:
            out = self.condition_score(cond_fn, out, x, t, model_kwargs)
        eps = self._predict_eps_from_xstart(x, t, out["pred_xstart"])
        here, before = self.at(self.alphas_cumprod, t, x), self.at(self.alphas_cumprod_prev, t, x)
        sigma = eta * torch.sqrt((1 - before) / (1 - here)) * torch.sqrt(1 - here / before)
        noise = torch.randn_like(x)
        mean = out["pred_xstart"] * torch.sqrt(before) + torch.sqrt(1 - before - sigma**2) * eps
        later = (t != 0).to(self.precision).view(-1, *[1] * (x.dim() - 1))
        return {"sample": mean + later * sigma * noise, "pred_xstart": out["pred_xstart"]}

    def ddim_reverse_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None, eta=0.0):
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        if cond_fn is not None:
            out = self.condition_score(cond_fn, out, x, t, model_kwargs)
        eps, after = self._predict_eps_from_xstart(x, t, out["pred_xstart"]), self.at(self.alphas_cumprod_next, t, x)
        return {"sample": out["pred_xstart"] * after.sqrt() + (1 - after).sqrt() * eps, "pred_xstart": out["pred_xstart"]}

    def _progressive(self, step, model, shape, noise, device, progress, **options):
        device = next(model.parameters()).device if device is None else device
        img = torch.randn(*shape, device=device) if noise is None else noise
        steps = list(range(self.num_timesteps))[::-1]
        if progress:
            from tqdm.auto import tqdm

            steps = tqdm(steps)
        for i in steps:
            t = torch.tensor([i] * shape[0], device=device)
            with torch.no_grad():
                out = step(model, img, t, **options)
                yield out
                img = out["sample"]

    def p_sample_loop_progressive(self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None,
                                  model_kwargs=None, device=None, progress=False):  # fmt: skip
        options = {"clip_denoised": clip_denoised, "denoised_fn": denoised_fn, "cond_fn": cond_fn, "model_kwargs": model_kwargs}
        yield from self._progressive(self.p_sample, model, shape, noise, device, progress, **options)

    def ddim_sample_loop_progressive(self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None,
                                     model_kwargs=None, device=None, progress=False, eta=0.0):  # fmt: skip
        options = {"clip_denoised": clip_denoised, "denoised_fn": denoised_fn, "cond_fn": cond_fn, "model_kwargs": model_kwargs}
        yield from self._progressive(self.ddim_sample, model, shape, noise, device, progress, eta=eta, **options)

    def p_sample_loop(self, model, shape, **options):
        return list(self.p_sample_loop_progressive(model, shape, **options))[-1]["sample"]

    def ddim_sample_loop(self, model, shape, **options):
        return list(self.ddim_sample_loop_progressive(model, shape, **options))[-1]["sample"]

    def _vb_terms_bpd(self, model, x_start, x_t, t, clip_denoised=True, model_kwargs=None):
        true_mean, _, true_log = self.q_posterior_mean_variance(x_start, x_t, t)
        out = self.p_mean_variance(model, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs)
        kl = mean_of_samples(normal_kl(true_mean, true_log, out["mean"], out["log_variance"])) / math.log(2)
        nll = mean_of_samples(-log_likelihood_of_levels(x_start, out["mean"], 0.5 * out["log_variance"])) / math.log(2)
        return {"output": torch.where(t == 0, nll, kl), "pred_xstart": out["pred_xstart"]}

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t, terms, kind = self.q_sample(x_start, t, noise=noise), {}, self.loss_type.name
        if kind.endswith("KL"):
            loss = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised=False, model_kwargs=model_kwargs)["output"]
            return {"loss": loss * self.num_timesteps if kind == "RESCALED_KL" else loss}
        output = model(x_t, self._scale_timesteps(t), **(model_kwargs or {}))
        if self.model_var_type.name.startswith("LEARNED"):
            output, values = torch.split(output, x_t.shape[1], dim=1)
            frozen = torch.cat([output.detach(), values], dim=1)
            terms["vb"] = self._vb_terms_bpd(lambda *args, **kwargs: frozen, x_start, x_t, t, clip_denoised=False)["output"]
            if kind == "RESCALED_MSE":
                terms["vb"] = terms["vb"] * (self.num_timesteps / 1000.0)
        targets = {
            "PREVIOUS_X": self.q_posterior_mean_variance(x_start, x_t, t)[0],
            "START_X": x_start,
            "EPSILON": noise,
        }
        terms["mse"] = mean_of_samples((targets[self.model_mean_type.name] - output) ** 2)
        terms["loss"] = terms["mse"] + terms["vb"] if "vb" in terms else terms["mse"]
        return terms

    def calc_bpd_loop(self, model, x_start, clip_denoised=True, model_kwargs=None):
        vb, xstart_mse, mse = [], [], []
        for i in list(range(self.num_timesteps))[::-1]:
            t, noise = torch.tensor([i] * len(x_start), device=x_start.device), torch.randn_like(x_start)
            x_t = self.q_sample(x_start, t, noise=noise)
            with torch.no_grad():
                out = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs)
            vb.append(out["output"])
            xstart_mse.append(mean_of_samples((out["pred_xstart"] - x_start) ** 2))
            mse.append(mean_of_samples((self._predict_eps_from_xstart(x_t, t, out["pred_xstart"]) - noise) ** 2))
        mean, _, log = self.q_mean_variance(x_start, torch.full((len(x_start),), self.num_timesteps - 1, device=x_start.device))
        prior = mean_of_samples(normal_kl(mean, log, torch.zeros_like(mean), torch.zeros_like(mean))) / math.log(2)
        vb, xstart_mse, mse = (torch.stack(of, dim=1) for of in (vb, xstart_mse, mse))
        return {"total_bpd": vb.sum(dim=1) + prior, "prior_bpd": prior, "vb": vb, "xstart_mse": xstart_mse, "mse": mse}


class SpacedDiffusion(GaussianDiffusion):
    """Of some of the timesteps: the model is told those of the whole process."""

    def __init__(self, use_timesteps, **kwargs):
        self.use_timesteps, self.timestep_map = set(use_timesteps), []
        self.original_num_steps, betas, last = len(kwargs["betas"]), [], 1.0
        for i, signal in enumerate(GaussianDiffusion(**kwargs).alphas_cumprod):
            if i in self.use_timesteps:
                betas.append(1 - signal / last)
                last = signal
                self.timestep_map.append(i)
        super().__init__(**kwargs | {"betas": np.array(betas)})

    def p_mean_variance(self, model, *args, **kwargs):
        return super().p_mean_variance(self._wrap_model(model), *args, **kwargs)

    def training_losses(self, model, *args, **kwargs):
        return super().training_losses(self._wrap_model(model), *args, **kwargs)

    def condition_mean(self, cond_fn, *args, **kwargs):
        return super().condition_mean(self._wrap_model(cond_fn), *args, **kwargs)

    def condition_score(self, cond_fn, *args, **kwargs):
        return super().condition_score(self._wrap_model(cond_fn), *args, **kwargs)

    def _wrap_model(self, model):
        return model if isinstance(model, WrappedModel) else WrappedModel(model, self)

    def _scale_timesteps(self, t):
        return t  # the wrapped model does that


class WrappedModel:
    def __init__(self, model, diffusion):
        self.model, self.timestep_map = model, diffusion.timestep_map
        self.factor = 1000.0 / diffusion.original_num_steps if diffusion.rescale_timesteps else None

    def __call__(self, x, ts, **kwargs):
        times = torch.tensor(self.timestep_map, device=ts.device, dtype=ts.dtype)[ts]
        return self.model(x, times if self.factor is None else times.float() * self.factor, **kwargs)


def normal_kl(mean1, logvar1, mean2, logvar2):
    apart = torch.exp(logvar1 - logvar2) + (mean1 - mean2) ** 2 * torch.exp(-logvar2)
    return 0.5 * (-1.0 + logvar2 - logvar1 + apart)


def approximate_normal_cdf(x):
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


def log_likelihood_of_levels(x, means, log_scales):
    """Of data in 256 levels from -1 to 1."""
    centred, inverse = x - means, torch.exp(-log_scales)
    upper, lower = (approximate_normal_cdf(inverse * (centred + shift)) for shift in (1.0 / 255.0, -1.0 / 255.0))
    log_upper, log_rest = torch.log(upper.clamp(min=1e-12)), torch.log((1.0 - lower).clamp(min=1e-12))
    within = torch.log((upper - lower).clamp(min=1e-12))
    return torch.where(x < -0.999, log_upper, torch.where(x > 0.999, log_rest, within))
