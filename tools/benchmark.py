"""Time the backbone as trained and as deployed (norms folded, channels last) on the CPU."""

import argparse

from _cli import run, whole_number


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('arch', nargs='+', metavar='ARCH', help='m0 ... m5, a0 ... a5')
    parser.add_argument(
        '--size', type=whole_number(1), nargs=2, default=(512, 512), metavar=('H', 'W'), help='default: 512 512'
    )
    parser.add_argument(
        '--rounds', type=whole_number(1), default=10, metavar='N', help='measurements of each (default: 10)'
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    from projects.recnext.recnext.benchmark import benchmark_backbone

    for arch in args.arch:
        print(benchmark_backbone(arch, tuple(args.size), args.rounds), flush=True)


if __name__ == '__main__':
    run(main)
