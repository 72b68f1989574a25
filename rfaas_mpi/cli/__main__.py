"""`python -m rfaas_mpi.cli`: the command where its script is not on the PATH."""

import sys

from rfaas_mpi.cli import main

if __name__ == "__main__":
    sys.exit(main())
