"""Every claim about GPUs, measured in one run: ``python -m tools.gpu_proof``."""
