"""Few-step sampling: families, timesteps, the consistency function, noise and the loop."""
