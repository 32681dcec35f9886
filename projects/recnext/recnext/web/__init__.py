"""The page on which a segmentor can be tried, and predictions over HTTP."""
