"""How long a user waits before anything happens: a section of `clipgen bench`.

Every start is a process of its own, so that nothing is loaded but what the files' pages in the kernel's memory give.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

import torch

from .runs import ROOT, ClipgenError
from .timing import in_turns, row, spread

FIRST_PICTURE = 'from clipgen_lib import TextToImage; TextToImage.from_pretrained("shapes").to({device!r})("a small red star")'
GOALS = {"import": 0.1, "help": 0.5, "picture": 5.0}  # seconds, at most


def startup(device: torch.device, limits: dict, rounds: int = 3) -> dict:
    """Seconds of `import clipgen_lib`, `clipgen --help` and the first picture of the weights that come with the project.

    The first is a process less one that does nothing, of the same round; the others are whole processes, from their start to
    their end, on as many threads as they take.

    Returns:
        `table`, `rounds`, and `details` with the seconds of each kind of process, `nothing` among them.
    """
    commands = {
        "nothing": ("-c", "pass"),
        "import": ("-c", "import clipgen_lib"),
        "help": ("-m", "clipgen_lib", "--help"),
        "picture": ("-c", FIRST_PICTURE.format(device=str(device))),
    }
    seconds = in_turns({name: partial(started, *words) for name, words in commands.items()}, rounds, label="starts")
    added = [max(a - b, 0.0) for a, b in zip(seconds["import"], seconds["nothing"], strict=True)]
    values = {"import": spread(added), "help": spread(seconds["help"]), "picture": spread(seconds["picture"])}
    names = {
        "import": ("import clipgen_lib", "process less an empty one"),
        "help": ("clipgen --help", "whole process"),
        "picture": ('TextToImage.from_pretrained("shapes"), one picture', "whole process"),
    }
    table = [row(*names[name], value, GOALS[name], most=True, unit="s") for name, value in values.items()]
    return {"table": table, "rounds": rounds, "details": {name: spread(values) for name, values in seconds.items()}}


def started(*words: str) -> str:
    """What a fresh Python says that is given these words.

    Raises:
        ClipgenError: it fails.
    """
    here = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])  # this copy of the library
    done = subprocess.run([sys.executable, *words], env=os.environ | {"PYTHONPATH": here}, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
        raise ClipgenError(f"a process that was started to be timed has failed: {said[-1]}")
    return done.stdout
