"""LoRAs as vectors: read, weighted, combined, reduced, saved. Only files called host.py import
ComfyUI."""
