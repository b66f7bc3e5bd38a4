"""diffusers' schedulers of codes as the rule and its users see them: arguments, attributes and draws; steps by whole matrices."""

import math

import torch


class Output(dict):
    __getattr__ = dict.__getitem__


class VQDiffusionSchedulerOutput(Output):
    pass


class AmusedSchedulerOutput(Output):
    pass


class VQDiffusionScheduler:
    order = 1

    def __init__(self, num_vec_classes, num_train_timesteps=100, alpha_cum_start=0.99999, alpha_cum_end=0.000009,
                 gamma_cum_start=0.000009, gamma_cum_end=0.99999):  # fmt: skip
        self.config = {n: v for n, v in locals().items() if n != "self"}
        kept = torch.linspace(alpha_cum_start, alpha_cum_end, num_train_timesteps, dtype=torch.float64)
        masks = torch.linspace(gamma_cum_start, gamma_cum_end, num_train_timesteps, dtype=torch.float64)
        one = torch.ones(1, dtype=torch.float64)
        self.log_cumprod_at, self.log_cumprod_ct = (torch.cat(v).log() for v in ((kept, one), (masks, 0 * one)))
        self.log_at = (kept / torch.cat((one, kept[:-1]))).log()
        self.log_ct = (1 - (1 - masks) / (1 - torch.cat((0 * one, masks[:-1])))).log()
        self.timesteps = torch.arange(num_train_timesteps).flip(0)

    def set_timesteps(self, num_inference_steps, device=None):
        self.timesteps = torch.arange(num_inference_steps, device=device).flip(0)

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        log_p = model_output if timestep == 0 else self.q_posterior(model_output, sample, timestep)
        u = torch.rand(log_p.shape, generator=generator)
        prev = (log_p - (-(u + 1e-30).log() + 1e-30).log()).argmax(1)
        return VQDiffusionSchedulerOutput(prev_sample=prev) if return_dict else (prev,)

    def q_posterior(self, log_p_x_0, x_t, t):
        """log sum_{x0} q(x_t | x_{t-1}) q(x_{t-1} | x0) / q(x_t | x0) p(x0) by matrices from class to class, the mask last."""
        K = log_p_x_0.shape[1]

        def matrix(log_a, log_c, t):
            a, c = log_a[t].exp(), log_c[t].exp()
            to = torch.full((K + 1, K + 1), float((1 - a - c) / K), dtype=torch.float64)
            to[:, K], to[K] = c, 0
            to[K, K] = 1
            return to + a * torch.diag(torch.tensor([1.0] * K + [0.0], dtype=torch.float64))

        one = matrix(self.log_at, self.log_ct, t)
        upto, before = (matrix(self.log_cumprod_at, self.log_cumprod_ct, i) for i in (t, t - 1))
        share = log_p_x_0.double().exp().mT / upto[:K, x_t].permute(1, 2, 0)  # (B, N, K)
        return (share @ before[:K] * one[:, x_t].permute(1, 2, 0)).mT.log().float()  # (B, K + 1, N)

    def log_Q_t_transitioning_to_known_class(self):
        raise NotImplementedError

    def apply_cumulative_transitions(self):
        raise NotImplementedError


class AmusedScheduler:
    order = 1

    def __init__(self, mask_token_id, masking_schedule="cosine"):
        self.config = {"mask_token_id": mask_token_id, "masking_schedule": masking_schedule}
        self.timesteps = self.temperatures = None

    def set_timesteps(self, num_inference_steps, temperature=(2, 0), device=None):
        first, last = temperature if isinstance(temperature, (tuple, list)) else (temperature, 0.01)
        self.timesteps = torch.arange(num_inference_steps, device=device).flip(0)
        self.temperatures = torch.linspace(first, last, num_inference_steps, device=device)

    def ratio(self, timestep):
        done = torch.tensor(self.timesteps.tolist().index(timestep) + 1) / len(self.timesteps)
        return torch.cos(done * math.pi / 2) if self.config["masking_schedule"] == "cosine" else 1 - done

    def step(self, model_output, timestep, sample, starting_mask_ratio=1.0, generator=None, return_dict=True):
        shape, mask, t = sample.shape, self.config["mask_token_id"], int(timestep)
        if sample.dim() == 3:
            sample, model_output = sample.flatten(1), model_output.flatten(2).mT
        p = model_output.softmax(-1)
        pred = torch.multinomial(p.flatten(0, 1), 1, generator=generator).view(sample.shape)
        pred = prev = torch.where(sample == mask, pred, sample)
        if t != 0:
            u = torch.empty(sample.shape, dtype=p.dtype).uniform_(generator=generator)
            heat = self.temperatures[len(self.timesteps) - 1 - t]
            confidence = p.gather(-1, pred[..., None])[..., 0].log() - heat * (-u.log()).log()
            confidence = torch.where(sample == mask, confidence, torch.inf)
            count = int(sample.shape[1] * (starting_mask_ratio * self.ratio(t)))
            prev = pred.clone()
            for of, known, scores in zip(prev, sample != mask, confidence, strict=True):
                wait = max(1, min(count, int((~known).sum()) - 1))
                of[scores.argsort()[:wait]] = mask
        prev, pred = prev.view(shape), pred.view(shape)
        return AmusedSchedulerOutput(prev_sample=prev, pred_original_sample=pred) if return_dict else (prev, pred)

    def add_noise(self, sample, timesteps, generator=None):
        drawn = torch.rand(sample.shape, generator=generator)
        return torch.where(drawn < self.ratio(int(timesteps)), self.config["mask_token_id"], sample)
