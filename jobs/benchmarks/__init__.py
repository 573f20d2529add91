"""What `jobs.benchmark` measures, one module a subject."""
