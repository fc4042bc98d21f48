"""What is done to a network before it becomes a TorchScript file."""
