"""What a job trains on: prompts or captioned pictures, the latent bank, and each step's draws."""
