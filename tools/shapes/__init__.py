"""Images of one shape on a cluttered background, and a ResNet-18 trained to name it, for demo and tests."""
