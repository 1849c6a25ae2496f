"""What the LoRA learns: the steps of the teacher, and one file for each training loss.

A new objective also needs a row in table.py, a choice of `objective` in training/spec.py, and a
family in samplers/families.py, which says how its LoRAs are sampled.
"""
