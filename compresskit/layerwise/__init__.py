"""The layer-wise solver that all weight passes share: moments, the walk that collects them, the problem they pose."""
