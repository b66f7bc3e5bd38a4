"""The blocks of Diffusion Transformers, composed of the families' operators: one autograd node each."""
