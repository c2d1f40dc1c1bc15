"""The command ``alphaext`` as a process: ``python -m alphaext``, as torchrun can start it, is the same."""

from __future__ import annotations

import signal
import sys


def main() -> int:
    """Run the command line; a Ctrl-C is one sentence and exit code 130 from the first import to the last word."""
    try:
        from .commands.main import main as run

        return run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        # All is written, and Python's own end takes a while with torch. Blocked, too: where a Ctrl-C came while text ran as
        # code, as dataclasses are made, Python would end itself by the signal.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])


if __name__ == "__main__":
    sys.exit(main())
