"""Measure what fewer bits cost: one checkpoint in every format and precision, beside PyTorch."""

import argparse

from .options import add_cfg_options, add_model, whole_number, with_weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        '--size',
        nargs=2,
        type=whole_number(1),
        metavar=('HEIGHT', 'WIDTH'),
        help='of the images (default: the crops of the config)',
    )
    parser.add_argument(
        '--calibrate', metavar='FOLDER', help='images for 8 bits (default: of the training set, or drawn scenes)'
    )
    parser.add_argument(
        '--images', nargs='+', metavar='FILE', help='to compare on (default: of the test set, or drawn scenes)'
    )
    parser.add_argument('--parts', action='store_true', help='8 bits in all parts but one as well, and in one alone')
    add_cfg_options(parser)


def run(args: argparse.Namespace) -> None:
    from ..export.backend import ExportOptions
    from ..export.study import study

    settings = vars(with_weights(args))
    size = settings.pop('size')
    options = ExportOptions(
        size=[size] if size else None, calibrate=settings.pop('calibrate'), images=settings.pop('images')
    )
    for line in study(options=options, **settings):
        print(line, flush=True)
