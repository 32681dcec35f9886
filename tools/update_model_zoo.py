"""Write the tables of released models and metafile.yaml anew, from checkpoints/released.json."""

import argparse

from _cli import run


def parse_args() -> argparse.Namespace:
    return argparse.ArgumentParser(description=__doc__).parse_args()


def main() -> None:
    parse_args()
    from _model_zoo import update_model_zoo

    for path in update_model_zoo():
        print(f'written: {path}')


if __name__ == '__main__':
    run(main)
