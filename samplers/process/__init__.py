"""How ComfyUI's models mix picture and noise, and at which levels."""
