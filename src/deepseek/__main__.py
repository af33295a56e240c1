"""`python -m deepseek` is the command `deepseek`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
