"""Push a segmentor to the Hugging Face hub: weights, description, and a model card with its provenance."""

from _cli import run_tool

if __name__ == '__main__':
    run_tool('push')
