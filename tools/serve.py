"""Serve predictions over HTTP: an image in, its label map, areas or overlay out."""

from _cli import run_tool

if __name__ == '__main__':
    run_tool('serve')
