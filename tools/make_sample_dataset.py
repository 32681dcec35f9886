"""Make a small dataset of procedural scenes or objects, to try everything without a download."""

from _cli import run_tool

if __name__ == '__main__':
    run_tool('make-samples')
