"""What users would otherwise run: a FastAPI service around Captum, as public examples write it."""
