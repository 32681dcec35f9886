"""Export a checkpoint for another runtime, and check the file against PyTorch before it is written."""

import argparse
import dataclasses

from .options import WrongUse, add_cfg_options, add_fuse_option, add_model, whole_number, with_weights

FORMATS = {
    'coreml': '.mlpackage or .mlmodel',
    'onnx': '.onnx',
    'web': 'a folder',
}
"""What there is, and how its files are called."""

OWN = {
    'coreml': ('format', 'precision', 'target', 'compress'),
    'onnx': (),
    'web': ('precision', 'runtime'),
}
"""Options that only some have."""


def add_arguments(parser: argparse.ArgumentParser, to: str | None = None) -> None:
    """Of one format alone, if ``to`` says so already."""
    add_model(parser)
    if to is None:
        parser.add_argument('--to', required=True, choices=FORMATS, help='format of the file')
    suffixes = [FORMATS[to]] if to else [f'{suffix} ({name})' for name, suffix in FORMATS.items()]
    parser.add_argument('--out', required=True, metavar='FILE', help=f'what to write: {"; ".join(suffixes)}')
    parser.add_argument(
        '--part',
        choices=('segmentor', 'backbone'),
        default='segmentor',
        help='from pixels to labels, or the bare backbone on normalised images (default: segmentor)',
    )
    parser.add_argument(
        '--size',
        nargs=2,
        type=whole_number(1),
        action='append',
        metavar=('HEIGHT', 'WIDTH'),
        help='of the image (default: the crops of the config; ONNX: batches of any size); Core ML takes several',
    )
    parser.add_argument(
        '--output',
        choices=('labels', 'logits', 'both'),
        default='labels',
        help='class of every pixel, scores of the classes at a quarter of the size, or both (default: labels)',
    )
    add_fuse_option(parser)
    parser.add_argument(
        '--verify',
        action=argparse.BooleanOptionalAction,
        default=True,
        help='compare the saved file with PyTorch (default: on)',
    )
    parser.add_argument(
        '--images', nargs='+', metavar='FILE', help='to verify with (default: of the test set, or drawn scenes)'
    )
    parser.add_argument('--benchmark', action='store_true', help='measure the latency on this machine')
    if to != 'onnx':
        add_precision(parser, to)
    if to in ('coreml', None):
        add_coreml_options(parser.add_argument_group('Core ML', argument_default=argparse.SUPPRESS))
    if to in ('web', None):
        add_web_options(parser.add_argument_group('Web page', argument_default=argparse.SUPPRESS))
    add_cfg_options(parser)
    parser.set_defaults(**{'to': to} if to else {})


def add_precision(parser: argparse.ArgumentParser, to: str | None) -> None:
    """Of the numbers in a file; each format has its own default."""
    defaults = {'coreml': 'fp16', 'web': 'fp32'}
    said = defaults.get(to) or ', '.join(f'{name}: {default}' for name, default in defaults.items())
    parser.add_argument(
        '--precision', choices=('fp16', 'fp32'), default=argparse.SUPPRESS, help=f'of the weights (default: {said})'
    )


def add_coreml_options(group: argparse._ArgumentGroup) -> None:
    """Those that are not given are left to :class:`CoreMLBackend`."""
    group.add_argument('--format', choices=('mlprogram', 'neuralnetwork'), help='default: mlprogram')
    group.add_argument(
        '--target',
        metavar='iOS16',
        help='oldest system: iOS15 to iOS18 for mlprogram (default: iOS16), iOS13 or iOS14 for neuralnetwork',
    )
    group.add_argument(
        '--compress',
        choices=('none', 'palettize', 'linear8'),
        help='weights as one of 64 values, or as 8-bit integers (default: none)',
    )


def add_web_options(group: argparse._ArgumentGroup) -> None:
    """Those that are not given are left to :class:`WebBackend`."""
    group.add_argument(
        '--runtime', metavar='FILE', help="onnxruntime-web's npm package (default: from the cache, or by npm)"
    )


def run(args: argparse.Namespace) -> None:
    settings = vars(args)
    to = settings.pop('to')
    own = {name: settings.pop(name) for names in OWN.values() for name in names if name in settings}
    for name in own:
        if name not in OWN[to]:
            raise WrongUse(f'--{name} is for --to {" or ".join(other for other in OWN if name in OWN[other])}')
    from ..export.backend import ExportOptions
    from ..export.exporter import export

    if to == 'coreml':
        from ..export.coreml import CoreMLBackend as Backend
    elif to == 'web':
        from ..web.static_page import WebBackend as Backend
    else:
        from ..export.onnx import OnnxBackend as Backend
    settings = vars(with_weights(args))
    options = ExportOptions(**{field.name: settings.pop(field.name) for field in dataclasses.fields(ExportOptions)})
    print(export(Backend(**own), options=options, **settings))
