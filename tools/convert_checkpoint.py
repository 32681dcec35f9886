"""Convert RecNeXt weights: segmentors between mmseg 0.x and 1.x, ImageNet files between those, mmpretrain and timm."""

import argparse

from _cli import run


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('source', metavar='SRC', help='.pth or .safetensors file; its layout and arch are found')
    parser.add_argument('destination', metavar='DST', help='file to write; safetensors if it is called so')
    parser.add_argument('--config', metavar='CONFIG', help='config whose network the weights must fit')
    parser.add_argument(
        '--to',
        dest='target',
        choices=('mmseg1', 'mmpretrain', 'timm', 'legacy'),
        default='mmseg1',
        help='mmseg1 (default; of a classifier the backbone), mmpretrain or timm (classifiers), or legacy: as released',
    )
    parser.add_argument('--ema', action='store_true', help='take the averaged (EMA) weights of the file')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    from projects.recnext.recnext.apis.convert import convert_file

    print(convert_file(**vars(args)))


if __name__ == '__main__':
    run(main)
