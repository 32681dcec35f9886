"""Test a segmentor (mIoU) or a classifier (top-1 and top-5), on request with label maps and pictures."""

import argparse

from .options import (
    add_config_options,
    add_launcher_options,
    add_model,
    add_network_options,
    whole_number,
    with_deployment,
    with_weights,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument('--out', metavar='DIR', help='save label maps here, numbered as the annotations are')
    parser.add_argument('--show', action='store_true', help='show image | truth | prediction in a window')
    parser.add_argument('--show-dir', metavar='DIR', help='save pictures of image | truth | prediction here')
    parser.add_argument('--wait-time', type=float, default=2, metavar='SECONDS', help='with --show (default: 2)')
    parser.add_argument('--tta', action='store_true', help='average over the scales and flips of the config')
    add_network_options(parser)
    parser.add_argument('--batch-size', type=whole_number(1), metavar='N', help='images in a batch')
    parser.add_argument(
        '--overlap',
        action='store_true',
        help='start a batch before the last one is measured, for a GPU that waits',
    )
    parser.add_argument('--eval', nargs='+', choices=('mIoU',), help='understood as in mmseg 0.x; mIoU is the default')
    add_config_options(parser)
    add_launcher_options(parser)


def run(args: argparse.Namespace) -> None:
    from ..openmmlab.test import TestOptions, test

    del args.eval
    settings = with_deployment(with_weights(args))
    test(settings.pop('config'), settings.pop('checkpoint'), TestOptions(**settings))
