"""What brings the model repository to other machines: images, compose, metrics, Kubernetes (`docs/operations.md`)."""
