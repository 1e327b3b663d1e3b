"""What the probe starts in place of the zygote: hardened by the same plan, it tries one attack after the other.

It reads the plan and the targets from the order descriptor and says on the control descriptor, a line of JSON each,
what was put on, how every attack went, and that it has come to the end.
"""

import errno
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from . import harden
from .attacks import ATTACKS, SECONDS, Targets


def main() -> None:
    control, order = int(sys.argv[1]), int(sys.argv[2])
    with os.fdopen(order) as file:
        asked = json.load(file)
    try:
        _say(control, {"hardened": harden.harden(asked["plan"])})
    except RuntimeError as error:
        sys.exit(str(error))
    for attack in ATTACKS:
        stopped, evidence = _try(attack, asked["targets"])
        _say(control, {"attack": attack.__name__, "stopped": stopped, "evidence": evidence})
    _say(control, {"done": True})


def _say(fd: int, message: Any) -> None:
    os.write(fd, json.dumps(message).encode() + b"\n")


def _try(attack: Callable[[Targets], str], targets: Targets) -> tuple[bool, str]:
    """Whether it was stopped, and how. In a child of its own: one that the kernel ends was stopped."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(SECONDS)
        try:
            stopped, evidence = False, attack(targets)
        except OSError as error:
            stopped, evidence = True, errno.errorcode.get(error.errno or 0, str(error))
        except (MemoryError, RuntimeError) as error:
            stopped, evidence = True, str(error) or type(error).__name__
        except Exception as error:
            stopped, evidence = False, f"could not be tried: {error!r}"
        _say(write_end, [stopped, evidence])
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as file:
        said = file.readline()
    _, status = os.waitpid(child, 0)
    if said:
        stopped, evidence = json.loads(said)
        return stopped, evidence
    if not os.WIFSIGNALED(status) or os.WTERMSIG(status) == signal.SIGALRM:
        return False, f"no answer within {SECONDS} s"
    return True, f"ended by {signal.Signals(os.WTERMSIG(status)).name}"
