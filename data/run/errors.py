"""How a command ends: mistakes of the user in one sentence, Ctrl-C after the step under way."""

import os
import signal
import sys
from contextlib import contextmanager


class Mistake(ValueError):
    """What the user asked for cannot be done; the message is the sentence that says why."""


@contextmanager
def ctrl_c():
    """Context whose list fills at Ctrl-C, so that the step under way is finished; a second Ctrl-C ends the
    program at once.
    """
    came = []

    def note(*_):
        came.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, before)


def command(main):
    """Call main(). A Mistake, or a refusal of the system such as a full disk, ends the process
    with one sentence on stderr and exit code 2, Ctrl-C with 130; a bug keeps its traceback.
    """
    sys.stdout.reconfigure(errors="replace")  # text that the terminal cannot show must not end a run
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has left, as in `sample.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (Mistake, OSError) as error:
        sentence = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            sentence = f"{error.filename}: {error.strerror}"
        print(f"{os.path.basename(sys.argv[0])}: {sentence}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
