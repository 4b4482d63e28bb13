"""What a team keeps: jobs, deployments, and the catalogue of models, data and reports (MLflow)."""
