"""Export a checkpoint to Core ML, and check the file against PyTorch before it is written."""

from _cli import run_tool

if __name__ == '__main__':
    run_tool('export', to='coreml')
