"""Where metrics go: files, console, W&B, TensorBoard."""
