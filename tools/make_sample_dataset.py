"""Make a small dataset of procedural scenes in the layout of ADE20K, to try everything without a download."""

import argparse

from _cli import run, whole_number


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('root', metavar='DIR', help='folder of the dataset; made if missing')
    parser.add_argument(
        '--training', type=whole_number(1), default=400, metavar='N', help='training scenes (default: 400)'
    )
    parser.add_argument(
        '--validation', type=whole_number(1), default=40, metavar='N', help='validation scenes (default: 40)'
    )
    parser.add_argument(
        '--seed', type=whole_number(0), default=0, help='the same seed gives the same files (default: 0)'
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    from projects.recnext.recnext.sample_scenes import write_dataset

    print(write_dataset(**vars(args)))


if __name__ == '__main__':
    run(main)
