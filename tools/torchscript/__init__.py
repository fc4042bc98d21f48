"""Changes to a network before it becomes a TorchScript file."""
