"""What the LoRA learns: the solver's step of the teacher, and one training loss a file."""
