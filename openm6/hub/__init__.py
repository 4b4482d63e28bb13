"""What a team keeps: jobs."""
