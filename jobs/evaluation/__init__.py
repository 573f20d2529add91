"""Measuring a checkpoint on held-out images, and comparing two such measurements."""
