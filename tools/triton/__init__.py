"""Starts, watches and stops a Triton server, for the embedded server and the container."""
