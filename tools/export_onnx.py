"""Export a checkpoint to ONNX, and check the file in onnxruntime against PyTorch before it is written."""

import argparse

from _cli import add_cfg_options, add_export_options, run, with_export_options


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_export_options(parser, '.onnx', 'one fixed size of single images (default: batches of any size)')
    add_cfg_options(parser)
    return parser.parse_args()


def main() -> None:
    args = with_export_options(parse_args())
    from projects.recnext.recnext.export.exporter import export
    from projects.recnext.recnext.export.onnx import OnnxBackend

    print(export(OnnxBackend(), **args))


if __name__ == '__main__':
    run(main)
