"""Audit a trained model: `python eval.py --workdir runs/faces`. Same as `mdiff eval`."""

import sys

from mdiff.cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
