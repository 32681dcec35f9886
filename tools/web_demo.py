"""Serve a page on which images are predicted: overlay, legend, timings, and the mask to download."""

from _cli import run_tool

if __name__ == '__main__':
    run_tool('web')
