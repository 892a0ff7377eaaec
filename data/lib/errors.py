"""Ends a command cleanly: a user's mistake becomes one sentence, and Ctrl-C takes effect after the current step."""

import os
import signal
import sys
import time
from contextlib import ExitStack, contextmanager

from data.lib.escape import inert


class Mistake(ValueError):
    """The user asked for something that can't be done. The message is one sentence that says why."""


@contextmanager
def signals():
    """Collect SIGINT and SIGTERM in a list, so that a loop can finish its step before it stops."""
    received = []

    def receive(number, _):
        received.append(number)
        if "TORCHELASTIC_RUN_ID" not in os.environ:  # a second signal ends the process; torchrun sends each twice
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    with ExitStack() as old_handlers:
        for number in (signal.SIGINT, signal.SIGTERM):
            old_handlers.callback(signal.signal, number, signal.signal(number, receive))
        yield received


def command(main):
    """Call main(). A Mistake or an OSError becomes a sentence on stderr and exit code 2; a bug keeps its traceback."""
    sys.stdout.reconfigure(errors="replace")  # a terminal that can't show a character must not end a run
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has left, as in `sample.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (Mistake, OSError) as error:
        sentence = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else str(error)
        if os.environ.get("RANK", "0") != "0":
            time.sleep(2)  # rank 0 says the same, and then torchrun ends this process
        print(f"{os.path.basename(sys.argv[0])}: {inert(' '.join(sentence.split()))[:1000]}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
