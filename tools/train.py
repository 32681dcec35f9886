"""Train a segmentor or a classifier."""

from _cli import run_tool

if __name__ == '__main__':
    run_tool('train')
