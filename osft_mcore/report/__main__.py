"""`python -m osft_mcore.report RUN`: what a run starts; it ends with that run."""

import sys

from osft_mcore.parallel.world import end_with_parent
from osft_mcore.report.command import main

if __name__ == "__main__":
    end_with_parent()
    try:
        main(sys.argv[1:])
    # The run tells its user in one line; the traceback is for whoever tries the command.
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")
