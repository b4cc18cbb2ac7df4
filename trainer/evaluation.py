"""Validation: loss and perplexity over a split, and the share of held-out rows answered exactly right."""

import math
from collections.abc import Sequence

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

import comm
from parallel import evaluate
from trainer.answers import Answer, answer_rows
from trainer.batches import Share, evaluation_batches
from trainer.config import EvalConfig
from trainer.data import PlannedBatch, TokenizedRows, plan_epoch
from trainer.loss import TokenLoss


class Evaluator:
    """Measures a model on one split.

    Args:
        model: the (wrapped) model.
        tokenizer: the model's.
        loss: the training loss.
        rows: the split.
        config: the recipe's `eval:`.
        share: this rank's part of a batch; its accumulation is ignored.
        group: the data-parallel ranks.
        max_seq_len, pad_id: as in training.
        buckets: padded lengths of the training run, so that validation adds no shapes of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: TokenizerWrapper,
        loss: TokenLoss,
        rows: TokenizedRows,
        config: EvalConfig,
        share: Share,
        group: comm.Group,
        *,
        max_seq_len: int,
        pad_id: int,
        buckets: Sequence[int] | None = None,
    ):
        self.model, self.tokenizer, self.rows, self.config = model, tokenizer, rows, config
        self.share = Share(share.rank, share.size, share.micro_batch_size, accumulation=1)
        self.group, self.pad_id = group, pad_id
        self.mean_loss = evaluate(model, loss)
        plan = plan_epoch(
            rows.lengths,
            seed=0,
            epoch=0,
            global_batch_size=self.share.global_batch_size,
            max_seq_len=max_seq_len,
            shuffle=False,
            group_by_length=True,
            buckets=buckets,
        )
        self.plan = _spread(plan, config.batches)

    def loss(self) -> dict[str, float]:
        """`eval/loss` (mean over target tokens of all ranks) and `eval/ppl` (its exponential)."""
        was_training = self.model.training
        self.model.eval()
        loss, _ = self.mean_loss(evaluation_batches(self.rows, self.plan, self.share, self.pad_id))
        self.model.train(was_training)
        return {"eval/loss": loss, "eval/ppl": math.exp(min(loss, 700.0))}

    def answers(self) -> list[Answer]:
        """Answers to the held-out rows that the recipe asks for: all for `exact_match`, else the first `generate`."""
        wanted = len(self.rows) if self.config.exact_match else min(self.config.generate, len(self.rows))
        return answer_rows(
            self.model, self.tokenizer, self.rows, range(wanted), self.config.max_new_tokens, self.group
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
