"""The inputs of a prediction: files, folders and patterns as one list, and the name of what is made from each."""

import glob
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ..utils.errors import UserError
from ..utils.images import IMAGE_SUFFIXES

VIDEO_SUFFIXES = frozenset('.avi .m4v .mkv .mov .mp4 .mpeg .mpg .webm .wmv'.split())


class Input(NamedTuple):
    """An image or a video."""

    path: Path
    name: str
    """Its path from the folder that all inputs are in."""
    key: str
    """What its outputs are called, without suffix; unlike that of any other input."""

    @property
    def source(self) -> Path:
        """Where the image is read: here, its file."""
        return self.path

    @property
    def is_video(self) -> bool:
        """Whether it is called like a video."""
        return self.path.suffix.lower() in VIDEO_SUFFIXES


class Inputs:
    """All inputs, in an order that depends only on their names.

    Args:
        root: The innermost folder that all arguments are in.
        folders: The file names in each folder, by its path from ``root``.
    """

    def __init__(self, root: Path, folders: dict[str, set[str]]) -> None:
        self.root = root
        self.folders = folders

    def __len__(self) -> int:
        return sum(map(len, self.folders.values()))

    def __iter__(self) -> Iterator[Input]:
        for folder in sorted(self.folders):
            names, prefix = self.folders[folder], '' if folder == '.' else folder + os.sep
            stems = Counter(map(_stem, names))
            for name in sorted(names):
                stem = _stem(name)
                # a.jpg and a.png, or a.jpg and a.jpg.tif, would be called alike.
                alone = stems[stem] == 1 and (stem == name or stem not in names)
                path = prefix + name
                yield Input(self.root / path, path, prefix + stem if alone else path)


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def find_inputs(arguments: Sequence[str | Path], out_dir: str | Path) -> Inputs:
    """Find what the arguments of a command name.

    Args:
        arguments: Files (missing ones too: reading them will fail), folders, of which the images are taken,
            recursively and through links, and patterns with ``*``, ``?``, ``[]`` or ``**``.
        out_dir: Left out, where it is inside one of the folders. Hidden files are left out as well.

    Raises:
        UserError: a folder without images, a pattern that nothing fits, or outputs among the inputs.
    """
    out_dir = os.path.realpath(out_dir)
    roots, folders = [], defaultdict(set)
    for argument in map(str, arguments):
        place = os.path.abspath(argument)
        if glob.has_magic(argument) and not os.path.lexists(place):
            roots.append(_fixed_part(place))
            places = sorted(glob.iglob(place, recursive=True))
            if not places:
                raise UserError(f'Nothing fits {argument}')
        else:
            roots.append(place if os.path.isdir(place) else os.path.dirname(place))
            places = [place]
        for place in places:
            if not os.path.isdir(place):
                folders[os.path.dirname(place)].add(os.path.basename(place))
            elif not _add_images(folders, place, out_dir) and [place] == places:
                raise UserError(
                    f'{argument} holds no images. Expected files that end in {", ".join(sorted(IMAGE_SUFFIXES))}.\n'
                    '  Videos, and images of other names, are named one by one or by a pattern.'
                )
    root = os.path.commonpath(roots)
    return Inputs(Path(root), {os.path.relpath(folder, root): names for folder, names in folders.items()})


def _fixed_part(pattern: str) -> str:
    """The folder that everything that fits an absolute pattern is in."""
    fixed = os.path.dirname(pattern)
    while glob.has_magic(fixed):
        fixed = os.path.dirname(fixed)
    return fixed


def _add_images(folders: dict[str, set[str]], top: str, out_dir: str) -> bool:
    """Add the images in a folder and the folders in it; whether there were any."""
    if os.path.realpath(top) == out_dir:
        raise UserError(f'{top} is the folder of the outputs, too. Choose another --out-dir.')
    found, seen = False, {out_dir}
    for folder, inside, names in os.walk(top, followlinks=True):
        inside.sort()
        real = os.path.realpath(folder)
        if real in seen:
            inside.clear()  # a link in a circle, or the outputs
            continue
        seen.add(real)
        inside[:] = [name for name in inside if not name.startswith('.')]
        images = {n for n in names if not n.startswith('.') and os.path.splitext(n)[1].lower() in IMAGE_SUFFIXES}
        if images:
            folders[folder] |= images
            found = True
    return found
