"""Compare Settings: the same picture at many settings, in one sheet."""
