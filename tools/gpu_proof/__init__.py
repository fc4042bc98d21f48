"""What one GPU can show, measured in one run: ``python -m tools.gpu_proof``."""
