"""Few-step sampling with latent consistency models: timesteps, consistency function, samplers."""
