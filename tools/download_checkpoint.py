"""Download released checkpoints, checked: segmentors in mmseg 1.x form, ImageNet weights as released."""

from _cli import run_tool

if __name__ == '__main__':
    run_tool('download')
