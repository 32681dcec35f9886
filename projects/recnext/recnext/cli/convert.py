"""Convert RecNeXt weights: segmentors between mmseg 0.x and 1.x, ImageNet files between those, mmpretrain and timm."""

import argparse

from .options import FILE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_argument(
        'source', metavar='SRC', help='.pth or .safetensors file; its layout and arch are found'
    )
    source.complete = FILE
    parser.add_argument('destination', metavar='DST', help='file to write, in safetensors format if its name ends so')
    parser.add_argument('--config', metavar='CONFIG', help='config whose network the weights must fit')
    parser.add_argument(
        '--to',
        dest='target',
        choices=('mmseg1', 'mmpretrain', 'timm', 'legacy'),
        default='mmseg1',
        help='mmseg1 (default; of a classifier the backbone), mmpretrain or timm (classifiers), or legacy: as released',
    )
    parser.add_argument('--ema', action='store_true', help='take the averaged (EMA) weights of the file')


def run(args: argparse.Namespace) -> None:
    from ..checkpoints.convert import convert_file

    expected = None
    if args.config:
        from ..openmmlab.builder import build_on_meta
        from ..openmmlab.config import load_config

        expected = build_on_meta(load_config(args.config).model).state_dict()
    print(convert_file(**vars(args), expected=expected))
