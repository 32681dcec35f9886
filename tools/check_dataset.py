"""Look at every file of a dataset before training: what is missing, damaged or labelled for other classes."""

import argparse

from _cli import add_config_options, run


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', metavar='CONFIG', help='config file')
    parser.add_argument(
        '--split',
        nargs='+',
        choices=('train', 'val', 'test'),
        dest='splits',
        help='which datasets of the config (default: all)',
    )
    add_config_options(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    from projects.recnext.recnext.apis.check_dataset import check_dataset

    check_dataset(**vars(args))


if __name__ == '__main__':
    run(main)
