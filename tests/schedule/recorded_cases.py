"""The configs and runs that record_trajectories.py records, and how a record is laid out."""

SHAPE = (1, 2, 2, 2)
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
V = {"prediction_type": "v_prediction"}
X0 = {"prediction_type": "sample"}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
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
    "DDIMInverseScheduler": [
        ({}, FIVE),
        (SD | {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}, FIVE),
        (V | {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "clip_sample_range": 2.0}, FIVE),
        (X0 | {"clip_sample": False, "set_alpha_to_one": False}, {"num_inference_steps": 7, "begin": 2}),
        (SHORT | {"trained_betas": [0.001 * (j + 1) for j in range(40)], "clip_sample": False}, {"num_inference_steps": 40}),
    ],
    "LMSDiscreteScheduler": [
        ({}, FIVE),
        (SD | {"use_karras_sigmas": True}, {"num_inference_steps": 8}),
        (SD | V | {"use_exponential_sigmas": True}, FIVE | {"order": 3}),
        (X0 | {"use_beta_sigmas": True}, FIVE | {"order": 2}),
        (SD | {"timestep_spacing": "leading", "steps_offset": 1}, FIVE | {"order": 1}),
        (SD | V | {"timestep_spacing": "trailing"}, {"num_inference_steps": 7, "begin": 3}),
        (SHORT | {"beta_schedule": "squaredcos_cap_v2"}, {"num_inference_steps": 6}),
    ],
    "EDMEulerScheduler": [
        ({}, FIVE),
        (V | {"sigma_schedule": "exponential", "sigma_data": 1.0, "sigma_max": 20.0}, FIVE),
        ({"final_sigmas_type": "sigma_min", "rho": 5.0}, FIVE | {"s_churn": 2.0, "s_noise": 1.003}),
        (V, {"sigmas": [0.0, 0.3, 0.55, 0.9, 1.0]}),
        ({"sigma_min": 0.05}, {"num_inference_steps": 8, "begin": 3, "s_churn": 40.0, "s_tmin": 0.5, "s_tmax": 9.0}),
    ],
    "CMStochasticIterativeScheduler": [
        ({}, FIVE),
        ({"clip_denoised": False, "sigma_data": 1.0}, {"num_inference_steps": 1}),
        ({"s_noise": 1.003, "rho": 5.0, "sigma_max": 20.0}, {"num_inference_steps": 7, "begin": 2}),
        ({"num_train_timesteps": 151, "sigma_min": 0.01}, {"timesteps": [150, 106, 53, 0]}),
        ({"clip_denoised": False}, {"timesteps": [39, 22]}),
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
    "DDPMScheduler": [
        ({}, FIVE),
        ({"variance_type": "fixed_large", "clip_sample": False, "timestep_spacing": "linspace"}, FIVE),
        ({"variance_type": "learned_range", "beta_schedule": "squaredcos_cap_v2"}, FIVE),
        (SHORT | {"variance_type": "learned_range", "clip_sample": False}, FIVE),
        (V | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}, FIVE),
        (X0 | {"variance_type": "fixed_small_log", "beta_schedule": "laplace"}, FIVE),
        ({"beta_schedule": "sigmoid", "thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9}, FIVE),
        ({}, {"timesteps": [900, 700, 450, 100, 3]}),
        (SHORT | {"trained_betas": [0.001 * (j + 1) for j in range(40)]}, {"num_inference_steps": 8, "begin": 3}),
        (SHORT | {"beta_end": 0.05, "clip_sample_range": 2.0}, {"num_inference_steps": 40}),
    ],
    "EulerAncestralDiscreteScheduler": [
        ({}, FIVE),
        (SD | {"timestep_spacing": "leading", "steps_offset": 1}, FIVE),
        (SD | V | {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}, {"num_inference_steps": 7}),
        (V | {"beta_schedule": "squaredcos_cap_v2"}, FIVE),
        (SHORT | {"trained_betas": [0.001 * (j + 1) for j in range(40)]}, FIVE),
        (SHORT | V, {"num_inference_steps": 8, "begin": 3}),
        (SHORT, {"num_inference_steps": 1}),
    ],
    "LCMScheduler": [
        ({}, {"num_inference_steps": 4}),
        (V | {"clip_sample": True, "clip_sample_range": 0.5}, {"num_inference_steps": 4}),
        (X0 | {"thresholding": True}, {"num_inference_steps": 4}),
        ({"timestep_scaling": 0.1, "rescale_betas_zero_snr": True} | V, {"num_inference_steps": 4}),
        ({"original_inference_steps": 100}, {"num_inference_steps": 6, "strength": 0.5}),
        ({"beta_schedule": "linear"}, {"num_inference_steps": 4, "original_inference_steps": 30}),
        ({}, {"timesteps": [999, 759, 499, 259]}),
        ({}, {"timesteps": [999, 759, 499, 259], "strength": 0.6}),
        (SHORT | {"original_inference_steps": 20}, {"num_inference_steps": 5, "begin": 2}),
    ],
    "TCDScheduler": [
        ({}, {"num_inference_steps": 4, "eta": 0.3}),
        (V, {"num_inference_steps": 4, "eta": 1.0}),
        (X0 | {"set_alpha_to_one": False}, {"num_inference_steps": 4, "eta": 0.0}),
        (V | {"rescale_betas_zero_snr": True, "beta_schedule": "linear"}, {"num_inference_steps": 4, "eta": 0.3}),
        ({}, {"num_inference_steps": 6, "original_inference_steps": 30, "strength": 0.5, "eta": 0.7}),
        ({}, {"timesteps": [999, 759, 499, 259], "eta": 0.3}),
        ({}, {"timesteps": [999, 759, 499, 259], "strength": 0.6, "eta": 0.3}),
        (SHORT | {"original_inference_steps": 20}, {"num_inference_steps": 5, "begin": 2, "eta": 0.3}),
    ],
    "CogVideoXDDIMScheduler": [
        ({}, FIVE),
        (V | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, FIVE),
        (X0 | {"beta_schedule": "linear", "snr_shift_scale": 1.0, "set_alpha_to_one": False}, FIVE),
        ({"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "linspace"}, {"num_inference_steps": 7, "begin": 2}),
        (SHORT | {"trained_betas": [0.001 * (j + 1) for j in range(40)], "steps_offset": 1}, FIVE),
    ],
    "FlowMatchLCMScheduler": [
        ({}, FIVE),
        ({"shift": 3.0}, FIVE | {"shift": 5.0}),
        ({"use_dynamic_shifting": True, "shift_terminal": 0.1}, FIVE | {"mu": 1.15}),
        ({"shift": 3.0, "invert_sigmas": True}, FIVE),
        ({"use_beta_sigmas": True}, {"num_inference_steps": 6, "begin": 2}),
        ({"shift": 3.0}, {"sigmas": [1.0, 0.75, 0.4, 0.1]}),
    ],
    "FlowMatchEulerDiscreteScheduler": [
        ({}, FIVE),
        ({"shift": 3.0}, FIVE),
        ({"use_dynamic_shifting": True, "shift": 3.0}, FIVE | {"mu": 1.15}),
        ({"use_dynamic_shifting": True, "time_shift_type": "linear", "shift_terminal": 0.1}, FIVE | {"mu": 0.8}),
        ({"shift": 3.0, "invert_sigmas": True}, FIVE),
        ({"stochastic_sampling": True, "use_beta_sigmas": True}, FIVE),
        ({"use_karras_sigmas": True, "shift": 0.5}, FIVE),
        ({"use_exponential_sigmas": True}, {"num_inference_steps": 6, "begin": 2}),
        ({"shift": 3.0}, {"sigmas": [1.0, 0.75, 0.4, 0.1]}),
        ({"use_dynamic_shifting": True}, {"timesteps": [1000.0, 700.0, 300.0, 20.0], "mu": 0.5}),
        ({}, {"timesteps": [1000.0, 700.0, 300.0], "sigmas": [1.0, 0.6, 0.2]}),
    ],
    "DPMSolverMultistepScheduler": [
        (SD, FIVE),
        (SD | {"solver_order": 3, "use_karras_sigmas": True, "lower_order_final": False}, {"num_inference_steps": 7}),
        (SD | {"solver_type": "heun", "use_lu_lambdas": True, "euler_at_final": True}, FIVE),
        (SD | V | {"algorithm_type": "sde-dpmsolver++", "use_exponential_sigmas": True}, FIVE),
        (X0 | {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, {"num_inference_steps": 16}),
        (SD | {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun", "use_beta_sigmas": True}, FIVE),
        (SD | {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "solver_order": 3}, {"num_inference_steps": 16}),
        (V | {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "thresholding": True, "solver_type": "heun"}, FIVE),
        (X0 | {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"}, FIVE),
        (FLOW | {"flow_shift": 3.0}, FIVE),
        (FLOW | {"use_dynamic_shifting": True}, FIVE | {"mu": 0.9, "begin": 1}),
        ({"solver_order": 1, "timestep_spacing": "trailing", "rescale_betas_zero_snr": True} | V, {"num_inference_steps": 7}),
        (SD | {"solver_order": 3, "final_sigmas_type": "sigma_min"}, {"num_inference_steps": 14}),
        (SD | {"solver_order": 3, "final_sigmas_type": "sigma_min"}, {"num_inference_steps": 15}),
        (SD | {"final_sigmas_type": "sigma_min", "euler_at_final": True}, {"num_inference_steps": 15}),
        ({"beta_schedule": "squaredcos_cap_v2", "use_karras_sigmas": True}, FIVE),
        ({"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -3.0}, FIVE),
        (SD | {"thresholding": True, "sample_max_value": 1.5}, {"timesteps": [900, 700, 450, 100, 3]}),
    ],
    "UniPCMultistepScheduler": [
        (SD, FIVE),
        (SD | {"solver_order": 3, "use_karras_sigmas": True}, {"num_inference_steps": 7}),
        (
            SD | {"solver_order": 3, "lower_order_final": False, "solver_type": "bh1", "final_sigmas_type": "sigma_min"},
            {"num_inference_steps": 7},
        ),
        (SD | V | {"disable_corrector": [0, 2], "thresholding": True, "sample_max_value": 1.5}, FIVE),
        (SD | {"predict_x0": False, "final_sigmas_type": "sigma_min", "use_beta_sigmas": True}, FIVE),
        (X0 | {"predict_x0": False, "final_sigmas_type": "sigma_min", "solver_order": 3}, {"num_inference_steps": 8, "begin": 2}),
        (FLOW | {"flow_shift": 5.0}, FIVE),
        (FLOW | {"use_dynamic_shifting": True, "shift_terminal": 0.1, "solver_order": 3}, FIVE | {"mu": 0.9}),
        (FLOW | {"use_karras_sigmas": True, "sigma_min": 0.02, "sigma_max": 80.0}, FIVE),
        (FLOW | {"final_sigmas_type": "sigma_min"}, {"sigmas": [0.95, 0.7, 0.45, 0.2, 0.05]}),
        (X0 | {"solver_order": 1, "use_exponential_sigmas": True, "timestep_spacing": "trailing"}, FIVE),
    ],
}


def visited(timesteps, apart, table):
    """Where a run looks into alphas_cumprod."""
    looked = {0} | {int(t) for t in timesteps} | {int(t) - apart for t in timesteps}
    return sorted(t for t in looked if -1 <= t < table)
