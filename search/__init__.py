"""Finds the weights at which few-step pictures come closest to what styles draw in many."""
