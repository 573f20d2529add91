"""Sweeps: what is searched, the study, trials, the choice."""
