"""Train a recipe on this rank, and die by SIGKILL at a given step when asked to."""

import json
import os
import signal
import sys

from trainer.blas import load_fast_blas

load_fast_blas()  # before anything imports MLX

import comm
from trainer.recipe import recipe_from
from trainer.run import Stop, train


class KillAt(Stop):
    """Asked after every step; kills this process at the given one."""

    def __init__(self, step: int):
        self.step, self.asked = step, 0

    @property
    def number(self) -> int:
        """No signal, until it is too late."""
        self.asked += 1
        if self.asked == self.step:
            os.kill(os.getpid(), signal.SIGKILL)
        return 0


if __name__ == "__main__":
    recipe = recipe_from(json.loads(sys.argv[1]))
    sys.exit(train(recipe, comm.init(), KillAt(int(sys.argv[2])), []))
