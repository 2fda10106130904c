"""edgekd: distil, prune, quantize, export, measure and gate a PyTorch network for an edge device."""

__version__ = "0.1.0"
