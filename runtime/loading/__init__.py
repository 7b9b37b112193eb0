"""Weights: from files, folders and the hub to modules."""
