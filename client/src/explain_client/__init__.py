"""Explanations from a Triton server: ``ExplainClient("localhost:8001").explain("photo.jpg")``."""

from importlib.metadata import version

from explain_client.aio import AsyncExplainClient
from explain_client.client import ExplainClient
from explain_client.connection import TLS
from explain_client.errors import ExplainError, RefusedError, TimedOutError, UnavailableError
from explain_client.images import View
from explain_client.parameters import Parameters, TensorParameters
from explain_client.results import Attribution, Classification, Explanation, Level, Network, Prediction
from explain_client.tensors import TensorAttribution, TensorClient

__all__ = [
    "TLS",
    "AsyncExplainClient",
    "Attribution",
    "Classification",
    "ExplainClient",
    "ExplainError",
    "Explanation",
    "Level",
    "Network",
    "Parameters",
    "Prediction",
    "RefusedError",
    "TensorAttribution",
    "TensorClient",
    "TensorParameters",
    "TimedOutError",
    "UnavailableError",
    "View",
    "__version__",
]

__version__ = version("explain-client")
