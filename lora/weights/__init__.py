"""The weights of ComfyUI's models."""
