"""Convert a released RecNeXt checkpoint (mmseg 0.x segmentor or ImageNet file) to mmseg 1.x, or back."""

import argparse

from _cli import run


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('source', metavar='SRC', help='.pth or .safetensors file; its layout and arch are found')
    parser.add_argument('destination', metavar='DST', help='file to write')
    parser.add_argument('--config', metavar='CONFIG', help='config whose network the weights must fit')
    parser.add_argument('--to', dest='target', choices=('mmseg1', 'legacy'), default='mmseg1', help='default: mmseg1')
    parser.add_argument('--ema', action='store_true', help='take the averaged (EMA) weights of the file')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    from projects.recnext.recnext.converter import convert_file

    print(convert_file(**vars(args)))


if __name__ == '__main__':
    run(main)
