"""Train a model: `python train.py --config configs/faces.py --workdir runs/faces`. Same as `mdiff train`."""

import sys

from mdiff.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
