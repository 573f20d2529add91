"""What `jobs.benchmark` measures: a module a subject, `contenders` for what several measure, `gpu_rows` of `gpu`."""
