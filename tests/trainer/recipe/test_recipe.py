"""Recipes are read strictly, and everything wrong with one is said at once."""

from pathlib import Path

import pytest

from trainer.recipe.config import Recipe
from trainer.recipe.fill import walk
from trainer.recipe.load import RecipeError, load_recipe, recipe_from, to_yaml

GOOD = {"model": {"path": "owner/name"}, "data": {"train": "rows.jsonl"}}


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "my-recipe.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def problems_of(changes: dict) -> dict[str, str]:
    """Key path to text of each problem that the changes to a good recipe make."""
    with pytest.raises(RecipeError) as caught:
        recipe_from(GOOD | changes)
    return {problem.path: str(problem) for problem in caught.value.problems}


def test_defaults_are_those_of_the_conventions():
    """A default that drifts from what users were promised."""
    recipe = recipe_from(GOOD)
    assert (recipe.method, recipe.batch_size_per_device, recipe.grad_accumulation_steps) == ("lora", 4, 1)
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.targets) == (8, 16, "all-linear")
    assert (recipe.data.max_seq_len, recipe.data.packing, recipe.data.val_fraction) == (2048, "auto", 0)
    assert (recipe.optimizer.lr, recipe.optimizer.betas, recipe.optimizer.eps) == (1e-5, [0.9, 0.999], 1e-8)
    assert (recipe.schedule.name, recipe.max_grad_norm, recipe.epochs) == ("cosine", 1.0, 1)
    assert (recipe.parallel.dp_replicate, recipe.parallel.backend, recipe.parallel.wire_dtype) == (
        -1,
        "any",
        "float32",
    )
    assert (recipe.eval.every, recipe.checkpoint.every, recipe.logging.every, recipe.seed) == (
        200,
        100,
        10,
        0,
    )


def test_every_key_explains_itself():
    """A key without help, which the schema and the documentation would show empty."""
    for path, field in walk(Recipe):
        assert field.metadata["help"].endswith("."), path


def test_numbers_may_be_written_in_any_usual_way(write):
    """1e-5 without a dot is text to plain YAML readers."""
    text = "model: {path: a/b}\ndata: {train: x.jsonl}\noptimizer: {lr: 1e-5, eps: '1e-7'}\nmax_steps: 1e3\n"
    recipe = load_recipe(write(text))
    assert recipe.optimizer.lr == 1e-5 and recipe.optimizer.eps == 1e-7
    assert recipe.max_steps == 1000 and type(recipe.max_steps) is int
    assert type(recipe.lora.alpha) is float


def test_overrides_apply_in_order(write):
    """An override that is lost below a null section, in a list, or in favour of an earlier one."""
    path = write("model: {path: a/b, quantize: null}\ndata: {train: [{path: x.jsonl}, {path: y.jsonl}]}\n")
    overrides = [
        "model.quantize.bits=8",
        "data.train[1].weight=0.5",
        "seed=1",
        "seed=2",
        "max_grad_norm=null",
    ]
    recipe = load_recipe(path, overrides)
    assert (recipe.model.quantize.bits, recipe.model.quantize.group_size) == (8, 64)
    assert [source.weight for source in recipe.data.train] == [1.0, 0.5]
    assert recipe.seed == 2 and recipe.max_grad_norm is None


def test_output_folder_takes_the_recipe_s_name(write):
    """Two recipes that write into the same folder because neither names one."""
    assert load_recipe(write("model: {path: a/b}\ndata: {train: x.jsonl}")).output_dir == "runs/my-recipe"


def test_round_trip_through_yaml(write):
    """A saved recipe.yaml that reads back as another recipe."""
    changes = {
        "optimizer": {"lr": 3e-7, "betas": [0.8, 0.95]},
        "data": {"train": [{"path": "x", "columns": {"prompt": "q"}}]},
        "parallel": {"backend": {"tp": "jaccl", "default": "ring"}, "wire_dtype": None},
        "profile": {"start": 3},
        "model": {"config": {"model_type": "qwen3", "rope_scaling": None}, "tokenizer": "bpe:1024"},
    }
    recipe = recipe_from(GOOD | changes)
    assert load_recipe(write(to_yaml(recipe))) == recipe


def test_every_problem_is_reported_at_once():
    """Mending a recipe one error at a time."""
    found = problems_of(
        {
            "optimzer": {"lr": 1},
            "optimizer": {"lr": "fast", "betas": 0.9, "learning_rate": 1e-4},
            "lora": {"rank": 0},
            "method": "loar",
            "epochs": 1.5,
            "global_batch_size": 8,
            "grad_accumulation_steps": 2,
        }
    )
    assert set(found) == {
        "optimzer",
        "optimizer.lr",
        "optimizer.betas",
        "optimizer.learning_rate",
        "lora.rank",
        "method",
        "epochs",
        "grad_accumulation_steps",
    }
    assert "optimizer.lr = fast" in found["optimizer.lr"] and "a number >= 0" in found["optimizer.lr"]
    assert found["method"].endswith("allowed: lora, dora or full; did you mean lora?")
    assert found["optimzer"].endswith("did you mean optimizer?")
    assert "a whole number >= 1" in found["lora.rank"]


@pytest.mark.parametrize(
    "key, meant",
    [
        ("learning_rate", "optimizer.lr"),
        ("lora_r", "lora.rank"),
        ("gradient_accumulation_steps", "grad_accumulation_steps"),
        ("max_seq_length", "data.max_seq_len"),
        ("warmup_step", "schedule.warmup_steps"),
        ("output_dirs", "output_dir"),
    ],
)
def test_nearest_known_key(key, meant):
    """A wrong key whose right name is elsewhere in the tree or is another trainer's word."""
    assert problems_of({key: 1})[key].endswith(f"did you mean {meant}?")


def test_nearest_key_of_a_source():
    """Catches a misspelt key of one of several sources that is silently ignored."""
    wrong = problems_of({"data": {"train": [{"path": "x", "wieght": 2}]}})["data.train[0].wieght"]
    assert wrong.endswith("did you mean data.train[0].weight?")


@pytest.mark.parametrize(
    "changes, path",
    [
        ({"seed": True}, "seed"),
        ({"seed": None}, "seed"),
        ({"optimizer": {"lr": float("nan")}}, "optimizer.lr"),
        ({"optimizer": {"lr": 10**400}}, "optimizer.lr"),
        ({"optimizer": None}, "optimizer"),
        ({"optimizer": {"betas": [0.9]}}, "optimizer.betas"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, "optimizer.betas[1]"),
        ({"gradient_checkpointing": 0}, "gradient_checkpointing"),
        ({"data": {"train": {"path": "x"}}}, "data.train"),
        ({"data": {"train": [{"split": "train"}]}}, "data.train[0].path"),
        ({"data": {"train": [{"path": "x", "weight": 0}]}}, "data.train[0].weight"),
        ({"data": {"train": "x", "packing": "on"}}, "data.packing"),
        ({"parallel": {"backend": {"tpp": "ring"}}}, "parallel.backend.tpp"),
        ({"parallel": {"backend": {"tp": "rign"}}}, "parallel.backend.tp"),
        ({"parallel": {"tp": 0}}, "parallel.tp"),
        ({"parallel": {"tp": -1}}, "parallel.tp"),
        ({"parallel": {"pp": 2, "split": [4, 4, 4]}}, "parallel.split"),
        ({"parallel": {"pp": 2, "backend": "nccl"}}, "parallel.backend"),
        ({"parallel": {"pp": 2, "backend": {"default": "nccl"}}}, "parallel.backend"),
        ({"lora": {"targets": "all-linaer"}}, "lora.targets"),
        ({"model": {"path": "a/b", "quantize": {"bits": 7}}}, "model.quantize.bits"),
        ({"model": {"path": "a/b", "quantize": {}}, "method": "full"}, "model.quantize"),
        ({"model": {}}, "model.path"),
        ({"model": {"path": "a/b", "config": {"model_type": "llama"}}}, "model.path"),
        ({"model": {"config": {"model_type": "llama"}}}, "model.tokenizer"),
        ({"model": {"config": {"model_type": "llama"}, "tokenizer": "bpe:many"}}, "model.tokenizer"),
        ({"data": {}}, "data.train"),
        ({"data": {"train": "x", "format": "text", "loss_on": "assistant"}}, "data.loss_on"),
    ],
)
def test_refusals(changes, path):
    """A value or combination that would only fail after the model is loaded, or run as something else."""
    found = problems_of(changes)
    assert path in found and "allowed: " in found[path], found


def test_a_rule_is_not_judged_on_a_refused_value():
    """A second complaint that only comes from the default standing in for a wrong value."""
    assert set(problems_of({"model": {"path": 1.5}})) == {"model.path"}
    assert set(problems_of({"data": "rows.jsonl"})) == {"data"}
    assert set(problems_of({"global_batch_size": 0, "grad_accumulation_steps": 4})) == {"global_batch_size"}


@pytest.mark.parametrize(
    "text, message",
    [
        ("model: [a", "line 2, column 1"),
        ("seed: 1\nseed: 2\n", "line 2, column 1"),
        ("- a\n- b\n", "a map of keys to values"),
        ("3\n", "a map of keys to values"),
        ("true\n", "a map of keys to values"),
        ("!!set {a}\n", "a map of keys to values"),
        ("model: {config: " + "{a: " * 400 + "1" + "}" * 400 + "}\n", "nested too deeply"),
        ("seed: ${nothing}\n", "nothing"),
        ("seed: ???\n", "seed"),
    ],
)
def test_broken_yaml(write, text, message):
    """A traceback of the YAML reader instead of the place in the file."""
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(text))


def test_broken_overrides_are_problems_like_others(write):
    """One bad override that hides the others."""
    path = write("model: {path: a/b}\ndata: {train: x.jsonl}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ["optimizer.lr", "seed=[", "no.such.key=1", "lora.rank=x"])
    text = str(caught.value)
    assert text.startswith(f"{path}: 4 problems\n")
    assert "override optimizer.lr: not of the form key=value; did you mean optimizer.lr=...?" in text
    for key in ("seed", "no", "lora.rank"):
        assert f"\n  {key} = " in text


def test_missing_recipe_names_a_close_one(write):
    """A typing mistake in a file name that ends in a traceback."""
    path = write("seed: 1")
    with pytest.raises(FileNotFoundError, match=f"did you mean {path}"):
        load_recipe(path.with_name("my-recipes.yaml"))
    with pytest.raises(FileNotFoundError, match="is a folder"):
        load_recipe(path.parent)


def test_paths_are_found_beside_the_recipe(tmp_path, monkeypatch):
    """Catches a recipe that works in its own folder only, and a file there that goes before the working folder's."""
    for folder in ("there/rows", "here"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "there" / "rows" / "a.jsonl").touch()
    (tmp_path / "there" / "recipe.yaml").write_text("model: {path: owner/name}\ndata: {train: rows/a.jsonl}\n")
    monkeypatch.chdir(tmp_path / "here")
    found = load_recipe("../there/recipe.yaml")
    assert found.data.train == "../there/rows/a.jsonl" and found.model.path == "owner/name"
    (tmp_path / "here" / "rows").symlink_to(tmp_path / "there" / "rows")
    assert load_recipe("../there/recipe.yaml").data.train == "rows/a.jsonl"


@pytest.mark.parametrize("value", [2**63, 10**30, 1e308])
@pytest.mark.parametrize("key", ["lora.rank", "data.max_seq_len", "batch_size_per_device", "seed", "global_batch_size", "limits.memory_gib"])
def test_whole_numbers_of_more_than_64_bits_are_refused(key, value):
    """A number that MLX answers with a cast's error or an overflow long after the recipe was taken."""
    section, _, name = key.rpartition(".")
    found = problems_of({section: {name: value}} if section else {name: value})
    assert "too large; allowed: a" in found[key]


def test_whole_numbers_become_what_their_key_holds():
    """A whole number that stays one where MLX takes a float, and digits of a large one that a float rounds away."""
    recipe = recipe_from(GOOD | {"optimizer": {"lr": 10**30}, "seed": 2**63 - 1})
    assert recipe.optimizer.lr == 1e30 and type(recipe.optimizer.lr) is float and recipe.seed == 2**63 - 1


def test_rows_have_a_longest_length():
    """A length from which short rows, padded to a 256th of it, would fill the memory."""
    assert recipe_from(GOOD | {"data": GOOD["data"] | {"max_seq_len": 2**24}}).data.max_seq_len == 2**24
    assert "<= 16777216" in problems_of({"data": {"max_seq_len": 3_000_000_000}})["data.max_seq_len"]


def test_references_cannot_ask_for_gigabytes(tmp_path):
    """Ten lines of which each names the one before ten times: half a minute, and then the end of the memory."""
    levels = [f"a{n}: '{10 * f'${{a{n - 1}}}'}'" for n in range(1, 11)]
    lines = ["a0: xxxxxxxxxx", *levels]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(RecipeError, match=r"problem\n  a5: its references make it longer than 1,048,576 characters"):
        load_recipe(tmp_path / "bomb.yaml")
