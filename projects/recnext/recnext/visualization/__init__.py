"""Pictures: overlays with their legend, and image beside truth beside prediction."""
