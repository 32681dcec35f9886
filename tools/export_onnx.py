"""Export a checkpoint to ONNX, and check the file in onnxruntime against PyTorch before it is written."""

from _cli import run_tool

if __name__ == '__main__':
    run_tool('export', to='onnx')
