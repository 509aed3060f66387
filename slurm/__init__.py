"""What SLURM tells a process and what is told to SLURM."""
