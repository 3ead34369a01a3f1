"""`python -m moemla` is the command `moemla`."""

import sys

from moemla.cli import main

if __name__ == "__main__":
    sys.exit(main())
