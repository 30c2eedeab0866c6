"""The command line: `python -m drifa_attn`, the same as `drifa-attn`."""

import sys

from drifa_attn.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
