"""Measure an accelerator in minutes: mmseg's testing and ours in every precision and form, training, a profile."""

import argparse

from .options import add_config, add_config_options, add_device, whole_number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument('checkpoint', metavar='CHECKPOINT', nargs='?', help='weights (default: random ones)')
    parser.add_argument(
        '--seconds',
        type=whole_number(1),
        default=600,
        metavar='N',
        help='what has not started by then is skipped and listed (default: 600)',
    )
    parser.add_argument('--tiny', action='store_true', help='use small images, to try the command without a GPU')
    add_device(parser)
    add_config_options(parser)


def run(args: argparse.Namespace) -> None:
    from ..benchmarks.gpu import benchmark_gpu

    benchmark_gpu(**vars(args))
