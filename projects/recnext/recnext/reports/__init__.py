"""The logs of runs read back, and the page about them."""
