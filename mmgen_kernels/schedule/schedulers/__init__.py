"""diffusers' schedulers by name and signature, whose steps are one pass: `mk.schedulers`."""
