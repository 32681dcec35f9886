"""Export a checkpoint to ONNX, and check the file in onnxruntime against PyTorch before it is written."""

import argparse

from _cli import add_cfg_options, add_export_options, run


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_export_options(parser, '.onnx', 'one fixed size of single images (default: batches of any size)')
    add_cfg_options(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    from projects.recnext.recnext.export.onnx import export_onnx

    print(export_onnx(**vars(args)))


if __name__ == '__main__':
    run(main)
