"""Explanations from a Triton server: ``ExplainClient("localhost:8001").explain("photo.jpg")``."""

from explain_client.client import ExplainClient, ExplainError, Explanation, Prediction

__all__ = ["ExplainClient", "ExplainError", "Explanation", "Prediction"]
