"""Platform services: the job queue, deployments, and the catalogue of models and data sets (MLflow)."""
