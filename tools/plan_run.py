"""Print what a run will need: memory of a GPU, disk, bytes of a push, seconds; builds nothing."""

import argparse
import os
import sys

from osft_mcore.errors import OsftError
from osft_mcore.log.redact import environment_secrets, without_secrets
from osft_mcore.plan.command import add_arguments, run_command


def main() -> int:
    """Parse the command line, make the plan, print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    try:
        sys.stdout.write(run_command(parser.parse_intermixed_args()))
    except OsftError as error:
        print(without_secrets(str(error), environment_secrets(os.environ)), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
