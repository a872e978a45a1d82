"""Every SQL statement of the service, by noun; rows become domain values here and nowhere else."""
