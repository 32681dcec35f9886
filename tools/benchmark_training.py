"""Time a training iteration in full and mixed precision, channels last, compiled and distributed, alternately."""

import argparse

from _cli import add_benchmark_options, add_cfg_options, run, whole_number


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', metavar='CONFIG', help='config file')
    parser.add_argument('--batch-size', type=whole_number(1), metavar='N', help="images (default: the config's)")
    add_benchmark_options(parser)
    add_cfg_options(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    from projects.recnext.recnext.benchmarks.training import benchmark_training

    benchmark_training(**vars(args))


if __name__ == '__main__':
    run(main)
