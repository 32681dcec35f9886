"""``python -m projects.recnext.recnext.cli``, as torchrun starts it."""

from .main import main

if __name__ == '__main__':
    main()
