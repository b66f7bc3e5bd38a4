"""Races of the fused operations against their rivals: `python -m benchmarks <family>`, `make bench FAMILY=<family>`."""
