"""Export a checkpoint for another runtime, and check the file against PyTorch before it is written."""

import argparse
import dataclasses
import math
from importlib import import_module
from typing import NamedTuple

from ..utils.errors import WrongUse
from .options import add_cfg_options, add_fuse_option, add_keep_float, add_model, whole_number, with_weights


class Format(NamedTuple):
    """A format, as far as the command line has to know it without importing it."""

    suffix: str  # of its files, for a person to read
    backend: tuple[str, str]  # file of the package and the class in it
    precisions: tuple[str, ...]  # the first is the default
    options: tuple[str, ...] = ()  # that it alone has


FORMATS = {
    'coreml': Format(
        '.mlpackage or .mlmodel',
        ('export.coreml', 'CoreMLBackend'),
        ('fp16', 'fp32', 'int8'),
        ('format', 'target', 'compress'),
    ),
    'executorch': Format('.pte', ('export.executorch', 'ExecutorchBackend'), ('fp32', 'int8')),
    'litert': Format('.tflite', ('export.litert', 'LitertBackend'), ('fp32', 'fp16', 'int8')),
    'onnx': Format('.onnx', ('export.onnx', 'OnnxBackend'), ('fp32', 'fp16', 'int8')),
    'web': Format('a folder', ('web.static_page', 'WebBackend'), ('fp32', 'fp16', 'int8'), ('runtime',)),
}
"""What there is."""

QUANTIZATION = ('calibrate', 'keep_float', 'max_drop')
"""Options that mean something with 8 bits alone."""


def add_arguments(parser: argparse.ArgumentParser, to: str | None = None) -> None:
    """Of one format alone, if ``to`` says so already."""
    add_model(parser)
    if to is None:
        parser.add_argument('--to', required=True, choices=FORMATS, help='format of the file')
    suffixes = [FORMATS[to].suffix] if to else [f'{one.suffix} ({name})' for name, one in FORMATS.items()]
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
    known = {name: one.precisions for name, one in FORMATS.items() if to in (name, None)}
    parser.add_argument(
        '--precision',
        choices=sorted({precision for precisions in known.values() for precision in precisions}),
        default=argparse.SUPPRESS,
        help='; '.join(f'{name}: {", ".join(precisions)}' for name, precisions in known.items()) + ' (default: first)',
    )
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
    if any('int8' in precisions for precisions in known.values()):
        add_quantization_options(parser.add_argument_group('--precision int8', argument_default=argparse.SUPPRESS))
    if to in ('coreml', None):
        add_coreml_options(parser.add_argument_group('Core ML', argument_default=argparse.SUPPRESS))
    if to in ('web', None):
        add_web_options(parser.add_argument_group('Web page', argument_default=argparse.SUPPRESS))
    add_cfg_options(parser)
    parser.set_defaults(**{'to': to} if to else {})


def add_quantization_options(group: argparse._ArgumentGroup) -> None:
    """Those that are not given are left to :class:`ExportOptions`."""
    group.add_argument(
        '--calibrate',
        metavar='FOLDER',
        help='some hundred images like those to come (default: of the training set, or drawn scenes)',
    )
    add_keep_float(group)
    group.add_argument(
        '--max-drop',
        type=points,
        metavar='POINTS',
        help='of mIoU that may be lost, where the test set has annotations (default: 1)',
    )


def points(text: str) -> float:
    """Type of an argument in points of mIoU."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f'expected a number of at least 0, found {text!r}')
    return value


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
    format = FORMATS[to]
    for name, other in FORMATS.items():
        foreign = [option for option in other.options if option in settings and option not in format.options]
        if foreign:
            raise WrongUse(f'--{foreign[0].replace("_", "-")} is for --to {name}')
    precision = settings.get('precision', format.precisions[0])
    if precision not in format.precisions:
        raise WrongUse(f'--precision {precision} is not for --to {to}: {", ".join(format.precisions)}')
    meaningless = [option for option in QUANTIZATION if option in settings and precision != 'int8']
    if meaningless:
        raise WrongUse(f'--{meaningless[0].replace("_", "-")} is for --precision int8')
    if 'max_drop' in settings and not (args.verify and args.part == 'segmentor'):
        raise WrongUse('--max-drop needs a segmentor that is verified: mIoU is of its labels')
    from ..export.backend import ExportOptions
    from ..export.exporter import export

    file, kind = format.backend
    backend = getattr(import_module(f'...{file}', __name__), kind)
    own = {name: settings.pop(name) for name in ('precision', *format.options) if name in settings}
    settings = vars(with_weights(args))
    common = [field.name for field in dataclasses.fields(ExportOptions) if field.name in settings]
    options = ExportOptions(**{name: settings.pop(name) for name in common})
    print(export(backend(**own), options=options, **settings))
