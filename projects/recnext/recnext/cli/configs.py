"""List the configs that come with this project, to be named without their path."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('words', nargs='*', metavar='WORD', help='only names that contain this, such as m3 or in1k')


def run(args: argparse.Namespace) -> None:
    from ..checkpoints.releases import read_releases
    from ..utils.errors import UserError
    from ..utils.paths import list_configs

    releases = {release['config']: release['name'] for release in read_releases() if 'config' in release}
    names = [path for path in list_configs() if all(word in path.stem for word in args.words)]
    if not names:
        raise UserError(f'No name of a config holds {" and ".join(args.words)}; recnext configs lists them all.')
    for path in names:
        release = releases.get(path.name)
        print(path.stem + (f'  ({release})' if release else ''))
