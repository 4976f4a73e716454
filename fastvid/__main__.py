"""`python -m fastvid` is the `fastvid` command."""

import sys

from fastvid.cli import main

if __name__ == "__main__":
    sys.exit(main())
