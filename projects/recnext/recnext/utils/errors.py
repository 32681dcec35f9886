"""The exceptions that are meant for the person at the keyboard, and for what started the program."""

START_AGAIN = 75
"""Exit code, EX_TEMPFAIL of sysexits.h: the work was interrupted in good order and goes on when it is started again."""


class UserError(Exception):
    """Something the user can put right: what was found, what was expected, what to do next.

    The command line tools print its message without a traceback and exit with code 1.
    """


class WrongUse(Exception):
    """Arguments that do not go together; the command line tools exit with code 2."""


class StartAgain(Exception):
    """Work that was interrupted, as it was asked to be; the command line tools exit with :data:`START_AGAIN`."""


OPENMMLAB = ('mmengine', 'mmcv', 'mmseg', 'mmpretrain')
"""Packages that only training, testing and configs of mmseg need."""


def name_missing_extra(error: ModuleNotFoundError) -> str | None:
    """Return how to install what an import did not find, if it is of OpenMMLab."""
    package = (error.name or '').partition('.')[0]
    return f'{package} is not installed, which this needs: pip install ".[mmseg]"' if package in OPENMMLAB else None


def printable(text: object, most: int | None = None) -> str:
    """What comes from outside, for a message: on one line, with an escape for whatever a terminal would act on.

    Args:
        text: A path, a name, a word of a file.
        most: How many of its characters are shown; None means all.
    """
    shown = str(text)[:most]
    letters = shown.encode('utf-8', 'backslashreplace').decode()
    escaped = ''.join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in letters)
    return escaped + '...' * (len(shown) < len(str(text)))


def first_line(error: Exception) -> str:
    """What an exception says, in short."""
    return (str(error).strip().splitlines() or [''])[0]
