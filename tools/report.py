"""Show what runs came to: curves, classes, confusion, images and config on one page, a single HTML file."""

import argparse

from _cli import run


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'work_dirs',
        metavar='WORK_DIR',
        nargs='+',
        help='of a run, or a JSON log of mmseg 0.x; the first is compared with each of the others',
    )
    parser.add_argument('--out', metavar='FILE', help='default: report.html in the first WORK_DIR')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    from projects.recnext.recnext.reports.html_report import write_report

    path = write_report(**vars(args))
    print(f'{path}: {path.stat().st_size / 1e6:.2f} MB, opens in any browser')


if __name__ == '__main__':
    run(main)
