"""The models that mmgen_kernels serves: trained, sampled and evaluated."""
