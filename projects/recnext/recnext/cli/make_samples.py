"""Make a small dataset of procedural scenes or objects, to try everything without a download."""

import argparse

from .options import whole_number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('root', metavar='DIR', help='folder of the dataset; made if missing')
    parser.add_argument(
        '--layout',
        choices=('ade20k', 'imagenet'),
        default='ade20k',
        help='scenes with annotations (default), or objects in folders of their classes',
    )
    parser.add_argument(
        '--training',
        type=whole_number(1),
        default=400,
        metavar='N',
        help='training scenes, or objects of each class (default: 400)',
    )
    parser.add_argument(
        '--validation',
        type=whole_number(1),
        default=40,
        metavar='N',
        help='validation scenes, or objects of each class (default: 40)',
    )
    parser.add_argument(
        '--seed', type=whole_number(0), default=0, help='the same seed gives the same files (default: 0)'
    )


def run(args: argparse.Namespace) -> None:
    settings = vars(args)
    if settings.pop('layout') == 'imagenet':
        from ..samples.objects import write_objects as write
    else:
        from ..samples.scenes import write_dataset as write

    print(write(**settings))
