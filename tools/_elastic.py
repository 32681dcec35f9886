"""torchrun for training, as dist_train.sh starts it: torchrun's arguments, then the program and its own."""

import _cli  # noqa: F401  (the project on the path)

from projects.recnext.recnext.openmmlab.elastic import main

if __name__ == '__main__':
    main()
