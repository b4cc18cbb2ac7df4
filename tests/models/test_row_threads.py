"""Rows on threads give the step's loss and gradients, the same bits each time, and leave nothing behind."""

import subprocess
import sys
import time

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from steps import CASES, FULL, Counted, assert_equal, batch_of, build

import comm
from parallel import DataParallel, RowThreads, TensorParallel, value_and_grad
from trainer.machine import row_threads

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


def test_cores_are_shared_by_the_ranks(monkeypatch):
    """Catches as many threads as cores in every rank."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr("trainer.machine.RowThreads", lambda num_threads, **options: num_threads)
    assert row_threads(8) is None
    assert row_threads(2) == 4


def test_blas_threads_come_back():
    """Catches a process that keeps one BLAS thread after its first step."""
    code = (
        "import ctypes, os; from trainer.blas import NAMES, load_fast_blas, one_blas_thread; load_fast_blas()\n"
        "blas = ctypes.CDLL(NAMES[0], mode=os.RTLD_NOLOAD)\n"
        "before = blas.openblas_get_num_threads()\n"
        "with one_blas_thread(): inside = blas.openblas_get_num_threads()\n"
        "print(inside, blas.openblas_get_num_threads() == before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={})
    if "cannot open shared object" in done.stderr:
        pytest.skip("needs OpenBLAS")
    assert done.stdout.split() == ["1", "True"], done.stderr
