"""Pictures: the classes over an image, with a legend."""
