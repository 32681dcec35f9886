"""Procedural datasets: scenes to segment, objects to classify."""
