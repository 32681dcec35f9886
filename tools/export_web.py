"""Export a checkpoint as a page that predicts in the browser: a folder of static files, checked before it is written."""

from _cli import run_tool

if __name__ == '__main__':
    run_tool('export', to='web')
