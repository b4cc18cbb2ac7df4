"""Train a recipe on this rank, in a folder of its own if asked, and send a signal to itself at a given step.

Arguments as one JSON object: recipe, step (0 = no signal), signal, ranks (None = all), folder (None = here).
"""

import json
import os
import sys

from trainer.blas import load_fast_blas

load_fast_blas()  # before anything imports MLX

import comm
from trainer.recipe import recipe_from
from trainer.run import Stop, train


class SignalAt(Stop):
    """Asked after every step; at the given one this process sends itself the signal."""

    def __init__(self, step: int, number: int):
        super().__init__()
        self.step, self.sent, self.asked = step, number, 0

    def requested(self) -> int:
        """The signal received so far."""
        self.asked += 1
        if self.asked == self.step:
            os.kill(os.getpid(), self.sent)
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
    stop = SignalAt(step, arguments["signal"]).install()
    code = train(recipe_from(arguments["recipe"]), world, stop, [])
    print("RESULT", json.dumps(code), flush=True)
    sys.exit(code)
