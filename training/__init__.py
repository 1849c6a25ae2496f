"""Latent consistency distillation into a LoRA (arXiv 2310.04378, 2311.05556)."""
