"""How a command ends: mistakes of the user in one sentence, a signal after the step under way."""

import os
import signal
import sys
import time
from contextlib import contextmanager

from data.lib.escape import inert


class Mistake(ValueError):
    """What the user asked for cannot be done; the message is the sentence that says why."""


@contextmanager
def signals():
    """Context whose list gets the number of a signal, that of Ctrl-C or SIGTERM, so that the step under way
    is finished; a second one ends the program at once, but for torchrun's, which follows the terminal's.
    """
    came, before = [], {}

    def note(number, _):
        came.append(number)
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, note)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
        sentence = inert(" ".join(sentence.splitlines()))[:1000]  # what it quotes may be a stranger's
        if os.environ.get("RANK", "0") != "0":  # torchrun ends this process where the first one says the same
            time.sleep(2)
        print(f"{os.path.basename(sys.argv[0])}: {sentence}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
