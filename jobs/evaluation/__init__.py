"""Measuring a checkpoint on held-out pictures, and comparing two such measurements."""
