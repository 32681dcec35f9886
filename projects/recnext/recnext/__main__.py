"""``python -m projects.recnext.recnext``: the command line, in a clone and as torchrun starts it."""

from .cli.main import main

if __name__ == '__main__':
    main()
