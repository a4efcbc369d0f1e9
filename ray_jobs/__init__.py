"""The jobs: each file is one program, run as `python -m ray_jobs.NAME`."""
