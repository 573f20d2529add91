"""The command lines: one entry point a file, run as `python -m jobs.NAME`, alone or by `ray job submit`."""
