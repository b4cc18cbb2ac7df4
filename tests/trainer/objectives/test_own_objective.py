"""An objective that is not in the table, given to `trainer.train`."""

from dataclasses import replace
from typing import get_args, get_type_hints

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from comm import solo
from tiny_recipes import tiny_recipe, write_rows
from trainer import Objective, train
from trainer.build import build
from trainer.metrics.records import read_records
from trainer.metrics.table import Metric
from trainer.objectives.table import OBJECTIVES
from trainer.recipe.config import ObjectiveConfig


class Smoothed(Objective):
    """Label smoothing of 0.1 on every token of the rows, each counted half."""

    metrics = (Metric("eval/halved", better=min),)

    def sequences(self, row):
        return (row._replace(mask=np.arange(len(row.tokens)) > 0),)

    def loss(self, model, batch):
        targets, mask = batch["tokens"][:, 1:], batch["mask"][:, 1:]
        logits = model(batch["tokens"][:, :-1]).astype(mx.float32)
        losses = nn.losses.cross_entropy(logits, targets, label_smoothing=0.1)
        return (0.5 * mask * losses).sum(), 0.5 * mask.sum()

    def validation(self, loss):
        return {"eval/loss": loss, "eval/halved": loss / 2}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Rows for all runs."""
    return write_rows(tmp_path_factory.mktemp("rows"))


def settings(rows, folder):
    return tiny_recipe(rows, folder, max_steps=4, data={"val_fraction": 0.2, "packing": False}, logging={"every": 1})


def test_steps_are_those_of_the_formula(rows, tmp_path):
    """Catches a divisor, a mask or a batch other than the objective's own."""
    run = build(settings(rows, tmp_path), solo(), lambda line: None, objective=Smoothed())
    data = run.batches.make(0)
    loss, grads, weight = run.step_fn(data.arrays())
    total = {name: mx.concatenate([batch[name] for batch in data.arrays()]) for name in ("tokens", "segments")}
    is_learned = (total["segments"] > 0)[:, 1:]
    assert weight.item() == 0.5 * is_learned.sum().item()

    def mean(model):
        logits = model(total["tokens"][:, :-1]).astype(mx.float32)
        losses = nn.losses.cross_entropy(logits, total["tokens"][:, 1:], label_smoothing=0.1)
        return (is_learned * losses).sum() / is_learned.sum()

    right, expected = nn.value_and_grad(run.model, mean)(run.model)
    assert loss.item() == pytest.approx(right.item(), rel=1e-5)
    for (name, found), (_, wanted) in zip(tree_flatten(grads), tree_flatten(expected), strict=True):
        assert mx.abs(found - wanted).max().item() <= 1e-5 * max(mx.abs(wanted).max().item(), 1e-9), name


def test_a_run_of_it(rows, tmp_path):
    """Catches metrics that are lost, tokens cached for another objective, and a checkpoint that another one continues."""
    recipe = settings(rows, tmp_path / "run")
    plain = train(settings(rows, tmp_path / "plain"))
    result = train(recipe, objective=Smoothed())
    found = [row["eval/halved"] for row in read_records(tmp_path / "run" / "metrics.jsonl") if "eval/halved" in row]
    assert found and min(found) == result.metrics["best/eval_halved"] == result.metrics["best/eval_loss"] / 2
    assert result.metrics["eval/loss"] != plain.metrics["eval/loss"] and "eval/ppl" not in result.metrics
    with pytest.raises(ValueError, match="objective.name: Smoothed then, sft now"):
        train(recipe, ["max_steps=6"])
    assert train(recipe, ["max_steps=6"], objective=Smoothed()).step == 6


@pytest.mark.parametrize("packing", ["auto", True])
def test_rows_of_one_line_never_see_each_other(rows, tmp_path, packing):
    """Catches packed lines given to a loss that calls the model as if they were one row: a wrong loss, without a word."""
    recipe = settings(rows, tmp_path)
    recipe = replace(recipe, data=replace(recipe.data, packing=packing, max_seq_len=256))
    if packing is True:
        with pytest.raises(ValueError, match="does not read segments"):
            build(recipe, solo(), print, objective=Smoothed())
        return
    notices = []
    assert not build(recipe, solo(), notices.append, objective=Smoothed()).opened.packed
    assert "packing is off: the objective Smoothed does not read segments" in notices[0]
    assert build(recipe, solo(), notices.append).opened.packed


def test_the_table_is_the_recipe_s_choice():
    """Catches an objective that no recipe can name, or a name without one."""
    assert set(OBJECTIVES) == set(get_args(get_type_hints(ObjectiveConfig)["name"]))
    assert all(make(ObjectiveConfig(name)).name == name for name, make in OBJECTIVES.items())
