"""Explanations from a Triton server: ``ExplainClient("localhost:8001").explain("photo.jpg")``."""

from importlib.metadata import version

from explain_client.aio import AsyncExplainClient
from explain_client.client import ExplainClient
from explain_client.errors import ExplainError, RefusedError, TimedOutError, UnavailableError
from explain_client.images import View
from explain_client.results import Attribution, Classification, Explanation, Level, Network, Prediction
from explain_client.tensors import TensorAttribution, TensorClient

__all__ = [
    "AsyncExplainClient",
    "Attribution",
    "Classification",
    "ExplainClient",
    "ExplainError",
    "Explanation",
    "Level",
    "Network",
    "Prediction",
    "RefusedError",
    "TensorAttribution",
    "TensorClient",
    "TimedOutError",
    "UnavailableError",
    "View",
    "__version__",
]

__version__ = version("explain-client")
