"""What `jobs.benchmark` measures, one module a subject; `contenders` are what several measure, `gpu_rows` gpu's own part."""
