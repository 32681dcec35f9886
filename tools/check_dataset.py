"""Look at every file of a dataset before training: what is missing, damaged or labelled for other classes."""

from _cli import run_tool

if __name__ == '__main__':
    run_tool('check-dataset')
