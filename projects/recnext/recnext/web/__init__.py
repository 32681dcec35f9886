"""The page on which a segmentor can be tried."""
