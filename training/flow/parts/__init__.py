"""A flow model from the files of its parts."""
