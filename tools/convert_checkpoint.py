"""Convert RecNeXt weights: segmentors between mmseg 0.x and 1.x, ImageNet files between those, mmpretrain and timm."""

from _cli import run_tool

if __name__ == '__main__':
    run_tool('convert')
