"""The one exception that is meant for the person at the keyboard."""


class UserError(Exception):
    """Something the user can put right: what was found, what was expected, what to do next.

    The command line tools print its message without a traceback and exit with code 1.
    """


def printable(text: str, most: int) -> str:
    """What a file says, for a message: its first characters, without any that a terminal would act on."""
    return repr(text[:most])[1:-1] + ('...' if len(text) > most else '')
