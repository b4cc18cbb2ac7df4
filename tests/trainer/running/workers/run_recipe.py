"""Train a recipe on this rank, in a folder of its own if asked, and send a signal to itself at a given step.

Arguments as one JSON object: recipe, step (0 = no signal), signal, ranks (None = all), folder (None = here), full_after
(step from which no file may grow to a checkpoint's size; 0 = never).
"""

import json
import os
import resource
import sys

from trainer.machine.blas import load_fast_blas

load_fast_blas()  # before anything imports MLX

import comm
from trainer.recipe.load import recipe_from
from trainer.training.requests import Stop
from training import train

LARGEST_FILE_BYTES = 32768


class SignalAt(Stop):
    """Asked after every step; at the given one this process sends itself the signal."""

    def __init__(self, step: int, number: int, full_after: int):
        super().__init__()
        self.step, self.sent, self.full_after, self.asked = step, number, full_after, 0

    def requested(self) -> int:
        """The signal received so far."""
        self.asked += 1
        if self.asked == self.step:
            os.kill(os.getpid(), self.sent)
        if self.asked == self.full_after:
            resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE_BYTES, LARGEST_FILE_BYTES))
        return super().requested()


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    world = comm.init()
    if arguments["folder"]:
        folder = os.path.join(arguments["folder"], str(world.rank))
        os.makedirs(folder, exist_ok=True)
        os.chdir(folder)
    ranks = arguments["ranks"]
    step = arguments["step"] if ranks is None or world.rank in ranks else 0
    stop = SignalAt(step, arguments["signal"], arguments["full_after"]).install()
    code = train(recipe_from(arguments["recipe"]), world, stop, [])
    print("RESULT", json.dumps(code), flush=True)
    sys.exit(code)
