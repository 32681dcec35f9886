"""What the command lines share: the project on the path, ``--cfg-options``, and errors without a traceback."""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


class CfgOptions(argparse.Action):
    """mmengine's ``DictAction``, imported only when it is used: ``--help`` should not wait for it."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Sequence[str],
        option_string: str | None = None,
    ) -> None:
        from mmengine.config import DictAction

        wrong = [value for value in values if '=' not in value]
        if wrong:
            parser.error(f'{option_string} takes key=value; found {" ".join(wrong)}')
        DictAction(self.option_strings, self.dest, nargs='+')(parser, namespace, values, option_string)


def whole_number(least: int) -> Callable[[str], int]:
    """Type of an argument that is a whole number of at least ``least``."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f'expected a whole number of at least {least}, found {text!r}')
        return int(text)

    return parse


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """The options that every tool with a config and its data has."""
    parser.add_argument('--work-dir', metavar='DIR', help='where logs go (default: work_dirs/<config>)')
    parser.add_argument('--data-root', metavar='DIR', help='folder that holds images/ and annotations/')
    add_cfg_options(parser)


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """Changes to a config."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=CfgOptions,
        metavar='KEY=VALUE',
        help='change settings of the config, such as train_dataloader.batch_size=8',
    )


def add_launcher_options(parser: argparse.ArgumentParser) -> None:
    """The options that the launch scripts pass on."""
    parser.add_argument('--launcher', choices=('none', 'pytorch', 'slurm'), default='none', help='set by the scripts')


def add_fuse_option(parser: argparse.ArgumentParser) -> None:
    """What of a trained network is multiplied out."""
    parser.add_argument(
        '--fuse',
        choices=('none', 'norms', 'all'),
        default='all',
        help='fold nothing, the norms, or Semantic FPN as well (default: all)',
    )


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """How a trained network is run; the defaults are the fastest that give the same label maps as mmseg."""
    add_fuse_option(parser)
    parser.add_argument('--precision', choices=('fp32', 'bf16', 'fp16'), default='fp32', help='default: fp32')
    parser.add_argument(
        '--channels-last',
        action=argparse.BooleanOptionalAction,
        default=True,
        help='memory order of weights and activations (default: on)',
    )
    parser.add_argument('--compile', action='store_true', help='torch.compile the network; slow to start')


def with_deployment(args: argparse.Namespace) -> dict:
    """The arguments as a dict, with those of :func:`add_network_options` as one ``deployment``."""
    from projects.recnext.recnext.models.deploy import Deployment
    from projects.recnext.recnext.utils.memory import keep_freed_memory

    keep_freed_memory()
    rest = vars(args)
    form = {name: rest.pop(name) for name in ('fuse', 'precision', 'channels_last', 'compile')}
    return dict(rest, deployment=Deployment(**form))


def add_export_options(parser: argparse.ArgumentParser, suffixes: str, size: str) -> None:
    """What the exporters share."""
    parser.add_argument('config', metavar='CONFIG', help='config file')
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='weights, of this project or as released (0.x)')
    parser.add_argument('--out', required=True, metavar='FILE', help=f'file to write, {suffixes}')
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
        help=size,
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


def with_export_options(args: argparse.Namespace) -> dict:
    """The arguments as a dict, with those of :func:`add_export_options` that say what is exported as ``options``."""
    from projects.recnext.recnext.export.backend import ExportOptions

    rest = vars(args)
    common = {field.name: rest.pop(field.name) for field in dataclasses.fields(ExportOptions)}
    return dict(rest, options=ExportOptions(**common))


def add_benchmark_options(parser: argparse.ArgumentParser) -> None:
    """What both benchmarks have."""
    parser.add_argument('--rounds', type=whole_number(1), default=5, metavar='N', help='measurements (default: 5)')
    parser.add_argument('--compile', action='store_true', help='measure torch.compile as well; takes minutes to start')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu', help='default: cpu')


def run(main: Callable[[], None]) -> None:
    """Exit with 0, or with 1 and the message of a user's mistake; other errors keep their traceback. Ctrl-C: 130."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        from projects.recnext.recnext.utils.errors import UserError

        if not isinstance(error, UserError):
            raise
        sys.exit(f'error: {error}')
