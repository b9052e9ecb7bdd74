"""Runs on a SLURM cluster: `submit` and `status` on the login node, `job` inside a job. No torch before a rank."""
