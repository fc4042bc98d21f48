"""Where classifiers come from: their weights, architectures, class names and preprocessing."""
