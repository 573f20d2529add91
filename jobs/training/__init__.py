"""Training on Ray Train: options, checks, the loop, methods, batches, validation, the run's folder."""
