"""Noise schedules: what a sampler does to a sample, planned on the host and done in one pass."""
