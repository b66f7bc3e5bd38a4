"""Nearest-codebook lookup and vector quantization."""
