"""LoRA algebra on tensors: key dialects, files, families, sums. Only host.py knows ComfyUI."""
