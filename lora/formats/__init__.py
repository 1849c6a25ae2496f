"""How a LoRA is written down: names, files, metadata, and the tensors of every dialect.

A new dialect of keys needs a line in key_endings.py (what the end of a key says) or in
module_names.py (which layer the rest of it names), or in both.
"""
