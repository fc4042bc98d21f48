"""Deployment of the model repository: images, compose, metrics, Kubernetes (`docs/operations.md`)."""
