"""Validation: loss and perplexity over a split, and the share of held-out rows answered exactly right."""

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

import comm
from parallel import evaluate
from trainer.data import PlannedBatch, TokenizedRows
from trainer.generation.answers import Answer, answer_rows
from trainer.recipe.config import EvalConfig
from trainer.training.batches import Share, evaluation_batches
from trainer.training.loss import StepLoss


class Evaluator:
    """Measures a model on one split.

    Args:
        model: The (wrapped) model.
        tokenizer: The model's.
        loss: The training loss.
        rows: The split.
        config: The recipe's `eval:`.
        plan: Every batch of the split, `share.global_batch_size` lines each.
        share: This rank's part of a batch, without accumulation.
        group: The ranks that answer different rows.
        pad_id: Token that fills rows up.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: TokenizerWrapper,
        loss: StepLoss,
        rows: TokenizedRows,
        config: EvalConfig,
        plan: list[PlannedBatch],
        share: Share,
        group: comm.Group,
        pad_id: int,
    ):
        self.model, self.tokenizer, self.rows, self.config = model, tokenizer, rows, config
        self.share, self.group, self.pad_id = share, group, pad_id
        self.mean_loss, self.objective = evaluate(model, loss), loss.objective
        self.plan = _spread(plan, config.batches)

    def loss(self) -> dict[str, float]:
        """What the objective tells of its mean over the batches of all ranks."""
        was_training = self.model.training
        self.model.eval()
        batches = evaluation_batches(self.rows, self.plan, self.share, self.pad_id)
        loss, _ = self.mean_loss(self.group.progress.reporting(batches))
        self.model.train(was_training)
        return self.objective.validation(loss)

    def answers(self) -> list[Answer]:
        """Answers to the held-out rows that the recipe asks for, always the same ones.

        All rows for `exact_match`, else the first `generate`; of rows of plain text, the first ones are continued.
        """
        wanted = len(self.rows) if self.config.exact_match else min(self.config.generate, len(self.rows))
        return answer_rows(
            self.model,
            self.tokenizer,
            self.rows,
            range(wanted),
            self.config.max_new_tokens,
            self.group,
            continue_texts=not self.config.exact_match,
        )

    def run(self) -> tuple[dict[str, float], list[Answer]]:
        """All metrics of one validation, and the answers to show."""
        metrics, answers = self.loss(), self.answers()
        if self.config.exact_match and answers:
            metrics["eval/exact_match"] = sum(answer.correct for answer in answers) / len(answers)
        return metrics, answers[: self.config.generate]


def _spread(plan: list[PlannedBatch], count: int) -> list[PlannedBatch]:
    """`count` batches evenly spread over the plan (which is ordered by length), or all of them."""
    if count < 0 or count >= len(plan):
        return plan
    return [plan[i * len(plan) // count] for i in range(count)]
