"""Time a training iteration in full and mixed precision, channels last, compiled and distributed, alternately."""

import argparse

from .options import add_benchmark_options, add_cfg_options, add_config, whole_number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument('--batch-size', type=whole_number(1), metavar='N', help="images (default: the config's)")
    parser.add_argument('--compile', action='store_true', help='measure torch.compile as well; takes minutes to start')
    add_benchmark_options(parser)
    add_cfg_options(parser)


def run(args: argparse.Namespace) -> None:
    from ..benchmarks.training import benchmark_training

    benchmark_training(**vars(args))
