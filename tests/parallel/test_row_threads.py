"""Rows on threads give the step's loss and gradients, the same bits each time, and leave nothing behind."""

import gc
import subprocess
import sys
import threading
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import comm
from parallel import DataParallel, RowThreads, TensorParallel, value_and_grad
from ranks import run_ranks
from steps import CASES, FULL, Counted, assert_equal, batch_of, build
from trainer.machine.facts import row_threads, usable_cores

HELPERS = Path(__file__).parents[1] / "helpers"
ROWS, LENGTH = 5, 48


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("slice_tokens", [1, 2 * LENGTH], ids=["a-row-each", "two-rows-each"])
def test_equals_the_plain_step(name, slice_tokens):
    """Catches rows that are left out or counted twice, dropout keys and documents of other rows, and weights of one
    thread's trace that another one reads: an uneven number of rows, one micro-batch and two.
    """
    architecture, options = CASES[name]
    model, loss = build(architecture, "full" if name in FULL else "lora", **options)
    plain = value_and_grad(model, loss)
    threaded = value_and_grad(model, loss, row_threads=RowThreads(2, slice_tokens))
    for batches in ([batch_of(1, LENGTH, ROWS)], [batch_of(2, LENGTH, ROWS), batch_of(3, LENGTH, ROWS)]):
        assert_equal(threaded(batches), plain(batches))


def test_equal_calls_give_equal_bits():
    """Catches sums whose order depends on which thread is first: a resumed run would leave its path."""
    model, loss = build("qwen3_5", "lora", dropout=0.3)
    step = value_and_grad(model, loss, row_threads=RowThreads(3, 1))
    first, *others = [step([batch_of(1, LENGTH, 7)]) for _ in range(4)]
    for other in others:
        assert first[0].item() == other[0].item()
        pairs = zip(tree_flatten(first[1]), tree_flatten(other[1]))
        assert all(mx.array_equal(a, b) for (_, a), (_, b) in pairs)


def test_weights_may_be_lazy():
    """Catches a thread that is to evaluate what the caller left lazy, which MLX refuses: an optimizer's update."""
    model, loss = build("llama", "full")
    plain, threaded = value_and_grad(model, loss), value_and_grad(model, loss, row_threads=RowThreads(2, 1))
    model.apply(lambda x: x * 1.5)
    found = threaded([batch_of(1, LENGTH, ROWS)])
    assert_equal(found, plain([batch_of(1, LENGTH, ROWS)]))


def test_a_small_batch_stays_whole():
    """Catches threads for what is a single slice, and for messages inside the pass."""
    model, loss = build("qwen3", "lora")
    counted = Counted(loss)
    value_and_grad(model, counted, row_threads=RowThreads(2))([batch_of(0, LENGTH, ROWS)])
    assert counted.count == 1
    divided = TensorParallel(build("qwen3", "full")[0], comm.solo())
    value_and_grad(divided, counted, row_threads=RowThreads(2, 1))([batch_of(0, LENGTH, ROWS)])
    assert counted.count == 2
    replicated = DataParallel(build("qwen3", "full")[0], comm.solo())
    value_and_grad(replicated, counted, row_threads=RowThreads(2, 1))([batch_of(0, LENGTH, ROWS)])
    assert counted.count == 2 + ROWS


def test_only_slices_in_work_hold_activations():
    """Catches slices that are all in memory at once."""
    model, loss = build("qwen3", "full")
    batch = batch_of(0, 512, 16)

    def peak(**options):
        mx.reset_peak_memory()
        mx.eval(value_and_grad(model, loss, **options)([batch]))
        return mx.get_peak_memory()

    assert peak(row_threads=RowThreads(2)) < 0.3 * peak()


def test_an_error_is_told_when_all_threads_are_done():
    """Catches an error that is lost in a thread, or told while others still change the model's arrays."""
    model, loss = build("qwen3", "lora")
    batch = batch_of(0, LENGTH, 2)
    first = batch["tokens"][:1].tolist()
    done = []

    def failing(model, batch):
        if batch["tokens"].tolist() == first:
            raise ZeroDivisionError
        time.sleep(0.3)
        done.append(True)
        return loss(model, batch)

    with pytest.raises(ZeroDivisionError):
        value_and_grad(model, failing, row_threads=RowThreads(2, 1))([batch])
    assert done
    assert_equal(value_and_grad(model, loss)([batch_of(0)]), value_and_grad(model, loss)([batch_of(0)]))


def test_not_with_compile():
    """Catches a compiled function that several threads share."""
    model, loss = build("qwen3", "lora")
    with pytest.raises(ValueError, match="compile_local and row_threads"):
        value_and_grad(model, loss, compile_local=True, row_threads=RowThreads(2))


@pytest.mark.parametrize("hosts, expected", [(["here"] * 8, None), (["here", "there"] * 2, 4)])
def test_cores_are_shared_by_the_ranks_of_a_host(monkeypatch, hosts, expected):
    """Catches as many threads as cores in every rank, and cores shared with the ranks of other hosts."""
    monkeypatch.setattr("trainer.machine.facts.usable_cores", lambda: 8)
    monkeypatch.setattr("trainer.machine.facts._shared_threads", lambda num_threads: num_threads)
    monkeypatch.setattr("socket.gethostname", lambda: "here")
    monkeypatch.setattr("comm.all_gather_object", lambda obj, group: hosts)
    assert row_threads(comm.solo()) == expected


@pytest.mark.parametrize("quota, expected", [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), (None, 8)])
def test_a_containers_share_of_the_cores(monkeypatch, tmp_path, quota, expected):
    """Catches a thread per core of the host in a container that may use two."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    if quota:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    assert usable_cores(str(tmp_path / "cpu.max")) == expected


def test_blas_threads_come_back():
    """Catches a process that keeps one BLAS thread after its first step."""
    code = (
        "import ctypes, os; from trainer.machine.blas import NAMES, load_fast_blas, one_blas_thread; load_fast_blas()\n"
        "blas = ctypes.CDLL(NAMES[0], mode=os.RTLD_NOLOAD)\n"
        "before = blas.openblas_get_num_threads()\n"
        "with one_blas_thread(): inside = blas.openblas_get_num_threads()\n"
        "print(inside, blas.openblas_get_num_threads() == before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={})
    if "cannot open shared object" in done.stderr:
        pytest.skip("needs OpenBLAS")
    assert done.stdout.split() == ["1", "True"], done.stderr


def test_lazy_arrays_anywhere_in_the_model():
    """Catches an array that a module keeps aside, or in a list, and that no other thread can compute."""
    model, loss = build("qwen3", "lora")
    model.factors, model._factor = [mx.ones(()) * 2], mx.ones(()) * 3
    model.freeze(keys=["factors"], recurse=False)

    def scaled(model, batch):
        loss_sum, num_tokens = loss(model, batch)
        return loss_sum * model.factors[0] * model._factor, num_tokens

    batch = batch_of(0, LENGTH, ROWS)
    found = value_and_grad(model, scaled, row_threads=RowThreads(2, 1))([batch])
    assert_equal(found, value_and_grad(model, scaled)([batch]))


@pytest.mark.parametrize("num_rows", [2, ROWS])
def test_gradients_keep_their_dtypes(num_rows):
    """Catches ranks whose gradients differ in size on the wire, as one has enough rows for threads and one has not."""
    model, loss = build("qwen3", "full")
    model.set_dtype(mx.bfloat16)
    _, grads, _ = value_and_grad(model, loss, row_threads=RowThreads(2, 2 * LENGTH))([batch_of(0, LENGTH, num_rows)])
    assert {grad.dtype for _, grad in tree_flatten(grads)} == {mx.bfloat16}


@pytest.mark.parametrize("wrong", [mx.ones((LENGTH,)), np.ones((1, ROWS)), mx.array(1.0)], ids=str)
def test_arrays_without_rows_are_refused(wrong):
    """Catches an array that is cut along another axis, or that every slice gets whole."""
    model, loss = build("qwen3", "lora")
    step = value_and_grad(model, loss, row_threads=RowThreads(2, 1))
    with pytest.raises(ValueError, match="extra.weights has shape .* first axis is the batch's 5 rows"):
        step([batch_of(0, LENGTH, ROWS) | {"extra": {"weights": wrong}}])


def test_numpy_and_nested_arrays_are_cut():
    """Catches slices that all get the rows of the whole batch."""
    model, loss = build("qwen3", "lora")
    nested = lambda model, batch: loss(model, batch["inner"])
    batch = batch_of(0, LENGTH, ROWS)
    outer = {"tokens": np.array(batch["tokens"]), "inner": batch}
    assert_equal(
        value_and_grad(model, nested, row_threads=RowThreads(2, 1))([outer]), value_and_grad(model, loss)([batch])
    )


def test_rows_have_random_numbers_of_their_own():
    """Catches threads that draw the same numbers, or others than the seed says."""
    model, _ = build("qwen3", "lora")
    drawn = []

    def noted(model, batch):
        drawn.append(mx.random.uniform().item())
        return model.layers[0].self_attn.q_proj.lora_b.sum(), mx.array(1)

    step = value_and_grad(model, noted, row_threads=RowThreads(2, 1))
    for seed in (1, 1, 2):
        mx.random.seed(seed)
        step([batch_of(0, LENGTH, 4)])
    first, again, other = (set(drawn[i : i + 4]) for i in (0, 4, 8))
    assert len(first) == 4 and first == again and not first & other


def test_gradients_of_all_threads_fit(monkeypatch):
    """Catches a gradient tree for each of many threads, whatever the size of the model."""
    model, loss = build("qwen3", "full")
    num_bytes = 4 * sum(weight.size for _, weight in tree_flatten(model.trainable_parameters()))
    threads = set()

    def noted(model, batch):
        threads.add(threading.get_ident())
        return loss(model, batch)

    for extra, most in ((num_bytes - 1, 1), (2 * num_bytes, 3)):
        threads.clear()
        monkeypatch.setattr("parallel.row_threads.EXTRA_GRADIENT_BYTES", extra)
        value_and_grad(model, noted, row_threads=RowThreads(5, 1))([batch_of(0, LENGTH, ROWS)])
        assert 0 < len(threads) <= most


def test_an_interrupt_leaves_the_model_whole():
    """Catches threads that go on with a model after Ctrl-C has returned to a notebook."""
    code = (
        "import os, signal, time\n"
        "import mlx.core as mx\n"
        "from steps import batch_of, build\n"
        "from parallel import RowThreads, value_and_grad\n"
        "model, loss = build('qwen3', 'lora')\n"
        "classes = [type(layer) for layer in model.layers]\n"
        "count = [0]\n"
        "def slow(model, batch):\n"
        "    count[0] += 1\n"
        "    if count[0] == 2: os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(1.0)\n"
        "    return loss(model, batch)\n"
        "try: value_and_grad(model, slow, row_threads=RowThreads(2, 1))([batch_of(0, 48, 20)])\n"
        "except KeyboardInterrupt: print('interrupted', [type(layer) for layer in model.layers] == classes, count[0] < 6)\n"
        "mx.eval(value_and_grad(model, loss)([batch_of(0, 48, 2)]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HELPERS)
    assert done.stdout.split() == ["interrupted", "True", "True"], (done.returncode, done.stderr)


def test_ranks_may_differ_in_threads():
    """Catches collectives that wait for the first use of a weight, and gradients of one rank in another dtype."""
    run_ranks(Path(__file__).parent / "workers" / "uneven_threads.py", 2)


def test_threads_end_with_their_object() -> None:
    """Catches threads, and with them MLX streams, that pile up in a notebook that builds one model after the other."""
    gc.collect()  # what other tests have left
    before = threading.active_count()
    for closes in (True, False):
        threads = RowThreads(3, 1)
        model, loss = build("qwen3", "lora")
        value_and_grad(model, loss, row_threads=threads)([batch_of(0, LENGTH, ROWS)])
        assert threading.active_count() == before + 3
        if closes:
            threads.close()
        del threads
        assert threading.active_count() == before


def test_the_process_ends_after_its_threads() -> None:
    """Catches "terminate called without an active exception": MLX's threads end while the process does (1 in 3 runs)."""
    code = (
        "import mlx.core as mx, mlx.nn as nn\n"
        "from parallel import RowThreads, value_and_grad\n"
        "model, rows = nn.Linear(8, 8), {'tokens': mx.zeros((32, 4), dtype=mx.int32), 'x': mx.ones((32, 8))}\n"
        "loss = lambda model, batch: (model(batch['x']).sum(), mx.array(1))\n"
        "for _ in range(3): mx.eval(value_and_grad(model, loss, row_threads=RowThreads(8, 1))([rows]))\n"
    )
    for _ in range(8):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
        assert done.returncode == 0, done.stderr
