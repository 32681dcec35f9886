"""Show what runs came to: curves, classes, confusion, images and config on one page, a single HTML file."""

from _cli import run_tool

if __name__ == '__main__':
    run_tool('report')
