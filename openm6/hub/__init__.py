"""What a team keeps: jobs, deployments."""
