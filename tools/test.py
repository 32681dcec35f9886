"""Test a segmentor (mIoU) or a classifier (top-1 and top-5), on request with label maps and pictures."""

import argparse

from _cli import add_config_options, add_launcher_options, add_network_options, run, whole_number, with_deployment


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', metavar='CONFIG', help='config file')
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='weights, of this project or as released (0.x)')
    parser.add_argument('--out', metavar='DIR', help='save label maps here, numbered as the annotations are')
    parser.add_argument('--show', action='store_true', help='show image | truth | prediction in a window')
    parser.add_argument('--show-dir', metavar='DIR', help='save pictures of image | truth | prediction here')
    parser.add_argument('--wait-time', type=float, default=2, metavar='SECONDS', help='with --show (default: 2)')
    parser.add_argument('--tta', action='store_true', help='average over the scales and flips of the config')
    add_network_options(parser)
    parser.add_argument('--batch-size', type=whole_number(1), metavar='N', help='images in a batch')
    parser.add_argument('--eval', nargs='+', choices=('mIoU',), help='understood as in mmseg 0.x; mIoU is the default')
    add_config_options(parser)
    add_launcher_options(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    del args.eval
    from projects.recnext.recnext.apis.test import test

    test(**with_deployment(args))


if __name__ == '__main__':
    run(main)
