"""The command line as a module, for launchers: ``torchrun -m cl_merge.cli run``."""

import sys

from cl_merge.cli import main

if __name__ == "__main__":
    sys.exit(main())
