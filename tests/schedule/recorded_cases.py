"""The configs and runs that record_trajectories.py records, and how a record is laid out."""

SHAPE = (1, 2, 2, 2)
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
V = {"prediction_type": "v_prediction"}
X0 = {"prediction_type": "sample"}
FIVE = {"num_inference_steps": 5}
SHORT = {"num_train_timesteps": 40}

CASES = {
    "DDIMScheduler": [
        ({}, FIVE),
        (SD | {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}, FIVE),
        (V | {"clip_sample": False, "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}, FIVE),
        (X0 | {"timestep_spacing": "linspace", "clip_sample_range": 0.5}, FIVE | {"eta": 0.3}),
        ({"beta_schedule": "squaredcos_cap_v2"}, FIVE | {"eta": 1.0, "use_clipped_model_output": True}),
        (
            {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5},
            FIVE | {"use_clipped_model_output": True},
        ),
        (SHORT | {"trained_betas": [0.001 * (j + 1) for j in range(40)], "clip_sample": False}, FIVE),
        (SHORT | V | {"thresholding": True}, {"num_inference_steps": 7, "begin": 2, "eta": 0.5}),
        (SHORT | {"beta_end": 0.05}, {"num_inference_steps": 40}),
        (SD | {"clip_sample": False}, {"num_inference_steps": 1}),
    ],
    "EulerDiscreteScheduler": [
        ({}, FIVE),
        (SD | {"timestep_spacing": "leading", "steps_offset": 1}, FIVE),
        (SD | V | {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}, FIVE),
        (SD | {"use_karras_sigmas": True}, FIVE | {"s_churn": 2.0, "s_noise": 1.003}),
        (SD | X0 | {"use_exponential_sigmas": True, "sigma_min": 0.05, "sigma_max": 9.0}, FIVE),
        (SD | {"use_beta_sigmas": True, "final_sigmas_type": "sigma_min"}, FIVE),
        (
            V | {"timestep_type": "continuous", "interpolation_type": "log_linear"},
            FIVE | {"s_churn": 40.0, "s_tmin": 0.5, "s_tmax": 9.0},
        ),
        (SD, {"sigmas": [14.6, 6.0, 2.5, 1.0, 0.3, 0.0]}),
        (SD, {"timesteps": [900, 700, 450, 100, 3]}),
        (SHORT | {"beta_schedule": "squaredcos_cap_v2"}, {"num_inference_steps": 8, "begin": 3}),
    ],
}


def visited(timesteps, apart, table):
    """Where a run looks into alphas_cumprod."""
    looked = {0} | {int(t) for t in timesteps} | {int(t) - apart for t in timesteps}
    return sorted(t for t in looked if -1 <= t < table)
