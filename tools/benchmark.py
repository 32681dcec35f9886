"""Test a model as mmseg or mmpretrain does and as this project does, alternately: speed by stage, memory, agreement."""

from _cli import run_tool

if __name__ == '__main__':
    run_tool('benchmark')
