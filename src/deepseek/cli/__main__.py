"""`python -m deepseek.cli` is the command `deepseek`."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
