"""Write the tables of released models, metafile.yaml and model-index.yml anew, from released.json."""

import argparse

from _cli import carry_out


def run(args: argparse.Namespace) -> None:
    from _model_zoo import update_model_zoo

    for path in update_model_zoo():
        print(f'written: {path}')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.set_defaults(run=run, parser=parser)
    carry_out(parser.parse_args())
