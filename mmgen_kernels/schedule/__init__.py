"""Noise schedules: a step of a sampler, guidance and noising in one pass each, and the tables of their coefficients."""
