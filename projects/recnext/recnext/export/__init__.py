"""Files for other runtimes, compared with PyTorch before they are written."""
