"""Measure an accelerator in minutes: mmseg's testing and ours in every precision and form, training, a profile."""

from _cli import run_tool

if __name__ == '__main__':
    run_tool('benchmark-gpu')
