"""How a LoRA is written down: names, files, metadata, and the tensors of every dialect."""
