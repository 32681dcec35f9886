"""Measure what fewer bits cost: one checkpoint in every format and precision, beside PyTorch."""

from _cli import run_tool

if __name__ == '__main__':
    run_tool('benchmark-export')
