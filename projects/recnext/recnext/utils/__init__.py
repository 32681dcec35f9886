"""Files, images, memory, time and progress: what knows nothing of networks. Imports no other room."""
