"""Export a checkpoint to Core ML, and check the file against PyTorch before it is written."""

import argparse

from _cli import add_cfg_options, add_export_options, run, with_export_options


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_export_options(
        parser,
        '.mlpackage or .mlmodel',
        'of the image; more than once for several sizes (default: the crops of the config)',
    )
    parser.add_argument(
        '--format', choices=('mlprogram', 'neuralnetwork'), default='mlprogram', help='default: mlprogram'
    )
    parser.add_argument('--precision', choices=('fp16', 'fp32'), default='fp16', help='default: fp16')
    parser.add_argument(
        '--target',
        metavar='iOS16',
        help='oldest system: iOS15 to iOS18 for mlprogram (default: iOS16), iOS13 or iOS14 for neuralnetwork',
    )
    parser.add_argument(
        '--compress',
        choices=('none', 'palettize', 'linear8'),
        default='none',
        help='weights as one of 64 values, or as 8-bit integers (default: none)',
    )
    add_cfg_options(parser)
    return parser.parse_args()


def main() -> None:
    args = with_export_options(parse_args())
    from projects.recnext.recnext.export.coreml import CoreMLBackend
    from projects.recnext.recnext.export.exporter import export

    own = {name: args.pop(name) for name in ('format', 'precision', 'target', 'compress')}
    print(export(CoreMLBackend(**own), **args))


if __name__ == '__main__':
    run(main)
