"""A network in another runtime on this machine: captured, converted, compared with PyTorch, kept on disk.

Nothing here knows of segmentors or classifiers: what goes in is a module from images to logits.
"""
