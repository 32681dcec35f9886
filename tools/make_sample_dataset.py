"""Make a small dataset of procedural scenes or objects, to try everything without a download."""

import argparse

from _cli import run, whole_number


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
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
    return parser.parse_args()


def main() -> None:
    args = vars(parse_args())
    if args.pop('layout') == 'imagenet':
        from projects.recnext.recnext.datasets.samples.objects import write_objects as write
    else:
        from projects.recnext.recnext.datasets.samples.scenes import write_dataset as write

    print(write(**args))


if __name__ == '__main__':
    run(main)
