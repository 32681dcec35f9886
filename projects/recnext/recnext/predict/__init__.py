"""Prediction for images, folders, videos and collections of any size."""
