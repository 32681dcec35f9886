"""Export a checkpoint as a page that predicts in the visitor's browser: a folder of static files."""

from _cli import run_tool

if __name__ == '__main__':
    run_tool('export', to='web')
