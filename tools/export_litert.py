"""Export a checkpoint to LiteRT, and check the file in its interpreter against PyTorch before it is written."""

from _cli import run_tool

if __name__ == '__main__':
    run_tool('export', to='litert')
