"""What the LoRA learns: the steps of the teacher, and one file for each training loss."""
