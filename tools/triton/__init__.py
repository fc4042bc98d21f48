"""Starting, watching and stopping a Triton server: what the embedded server and the container share."""
