"""Fine-tunes adapters for local control, with masked features and the Sobel z0 loss."""
