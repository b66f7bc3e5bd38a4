"""Norm, modulate, gate and residual: what stands between the sub-blocks of a Diffusion Transformer."""
