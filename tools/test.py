"""Test a segmentor (mIoU) or a classifier (top-1 and top-5), on request with label maps and pictures."""

from _cli import run_tool

if __name__ == '__main__':
    run_tool('test')
