"""Convert a BERT checkpoint to a clean directory: `python tools/convert.py SOURCE OUT_DIR`, as `minibert convert`."""

import sys

from minibert.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
