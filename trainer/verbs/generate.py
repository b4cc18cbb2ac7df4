"""`python -m trainer generate`: answers of a run's result to a prompt, to held-out rows, or to a chat.

All ranks generate in step; rank 0 reads what is typed and prints. Our launcher and mpirun hand rank 0 their input.
"""

import argparse
import io
import sys
from collections.abc import Iterator
from dataclasses import replace

import mlx.core as mx
from mlx_lm.generate import stream_generate
from mlx_lm.sample_utils import make_sampler

import comm
from trainer.agreement import end_on_interrupt
from trainer.build import Run, build
from trainer.data import training_format
from trainer.generation.answers import answer_rows
from trainer.metrics.streams import harmless
from trainer.recipe.problems import AgreedUserError
from trainer.results.opened import load_result, notice_on_stderr, shared_recipe

END = "/exit"  # Open MPI 5's mpirun hands rank 0 its input but not the end of it (openpmix #4024)


def main(arguments: argparse.Namespace) -> int:
    """Generate from `arguments.target`; returns the exit code."""
    world = comm.init()
    end_on_interrupt(world)
    recipe = shared_recipe(world, arguments.target, arguments.overrides)
    if arguments.max_new_tokens:
        recipe = replace(recipe, eval=replace(recipe.eval, max_new_tokens=arguments.max_new_tokens))
    run = build(recipe, world, notice_on_stderr(world))
    if arguments.rows:
        _compare_rows(run, arguments)
        return 0
    load_result(run, arguments.target, notice_on_stderr(run.world))
    run.model.eval()
    mx.random.seed(recipe.seed)  # ranks that share one model must draw the same tokens
    if arguments.prompt is not None:
        _answer(run, [{"role": "user", "content": arguments.prompt}], arguments.temperature)
        return 0
    return _chat(run, arguments.temperature)


def _compare_rows(run: Run, arguments: argparse.Namespace) -> None:
    """Held-out rows, answered before and after training."""
    rows = run.opened.splits.valid
    if rows is None:
        raise AgreedUserError(f"{arguments.target!r} was trained without validation rows; set data.valid=PATH.")
    limit = run.recipe.eval.max_new_tokens
    chosen = [i for i in range(len(rows)) if rows.prompt(i) is not None][: arguments.rows]
    if not chosen:
        raise AgreedUserError("The validation rows are plain text, without an answer to compare with; use --prompt.")
    before = answer_rows(run.model, run.opened.tokenizer, rows, chosen, limit, run.answer_group)
    load_result(run, arguments.target, notice_on_stderr(run.world))
    after = answer_rows(run.model, run.opened.tokenizer, rows, chosen, limit, run.answer_group)
    if run.world.rank != 0:
        return
    for base, tuned in zip(before, after):
        print(harmless(f"prompt    {tuned.prompt}\nexpected  {tuned.expected}\nbase      {base.given.strip()}"))
        print(harmless(f"tuned     {tuned.given.strip()}\n"))


def _chat(run: Run, temperature: float) -> int:
    """Answer each line that rank 0 reads, keeping the conversation where the rows are chats; ends with the input."""
    messages: list[dict[str, str]] = []
    is_chat = training_format(run.recipe.data, run.recipe.seed) == "chat"
    for line in _typed_lines(run.world):
        messages = [*(messages if is_chat else []), {"role": "user", "content": line}]
        messages.append({"role": "assistant", "content": _answer(run, messages, temperature)})
    return 0


def _typed_lines(world: comm.Group) -> Iterator[str]:
    """Rank 0's lines, on every rank; it may take as long as it likes to type them."""
    if world.rank == 0:
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")
        print(f"Type a prompt; {END} or the end of the input (Ctrl-D) ends the chat.", file=sys.stderr, flush=True)
    while True:
        with world.progress.long_phase("reading"):
            line = _read_line() if world.rank == 0 else ""
        line = comm.broadcast_object(line, world)
        if not line or line.strip() == END:
            return
        if line.strip():
            yield line.strip()


def _read_line() -> str:
    """The next line, or "" at the end of the input."""
    if sys.stdin.isatty():
        print("> ", end="", flush=True)
    return sys.stdin.readline()


def _answer(run: Run, messages: list[dict[str, str]], temperature: float) -> str:
    """Generate the next answer, printing as it comes; prompts are written as the training rows were."""
    tokenizer = run.opened.tokenizer
    if training_format(run.recipe.data, run.recipe.seed) == "chat":
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    else:
        prompt = tokenizer.encode(messages[-1]["content"])
    text = ""
    sampler = make_sampler(temp=temperature)
    limit = run.recipe.eval.max_new_tokens
    for response in stream_generate(run.model, tokenizer, prompt, max_tokens=limit, sampler=sampler):
        text += response.text
        if run.world.rank == 0:
            print(harmless(response.text), end="", flush=True)
    if run.world.rank == 0:
        print()
    return text
