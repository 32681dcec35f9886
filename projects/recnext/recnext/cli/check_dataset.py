"""Look at every file of a dataset before training: what is missing, damaged or labelled for other classes."""

import argparse

from .options import add_config, add_config_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument(
        '--split',
        nargs='+',
        choices=('train', 'val', 'test'),
        dest='splits',
        help='which datasets of the config (default: all)',
    )
    add_config_options(parser)


def run(args: argparse.Namespace) -> None:
    from ..openmmlab.check_dataset import check_dataset

    check_dataset(**vars(args))
