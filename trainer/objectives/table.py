"""The objectives of recipes, by `objective.name`."""

from collections.abc import Callable

from trainer.objectives.objective import Objective
from trainer.objectives.sft import SupervisedFineTuning
from trainer.recipe.config import ObjectiveConfig

# name -> config -> objective.
OBJECTIVES: dict[str, Callable[[ObjectiveConfig], Objective]] = {
    "sft": lambda config: SupervisedFineTuning(),
}
