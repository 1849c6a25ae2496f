"""Flow models as teachers: transformers that ComfyUI samples as rectified flow."""
