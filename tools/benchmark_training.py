"""Time a training iteration in full and mixed precision, channels last, compiled and distributed, alternately."""

from _cli import run_tool

if __name__ == '__main__':
    run_tool('benchmark-training')
