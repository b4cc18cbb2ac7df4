"""Forward and backward of a micro-batch in slices of rows, on several threads of one process.

For MLX's CPU backend, where a stream computes one operation after the other and only matrix products use more than
one core. Each thread has a stream of its own and goes through its slices one by one, so all cores have work, arrays
are small enough to stay in caches, and only one slice per thread holds activations. Sums are added in an order that the
number of threads fixes: equal calls give equal bits. GPUs gain nothing from it.
"""

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from comm.typed import integers, named_arrays
from parallel.extension import overridden_class
from parallel.sums import add_sums
from parallel.swapping import slots_of, swapped

# Fewer make matrix products slower, more leave the caches (two cores, 8 layers of 384 dims).
SLICE_TOKENS = 512
# Each thread sums gradients in a float32 tree of its own; those beyond the first take at most this much.
EXTRA_GRADIENT_BYTES = 4 << 30
TEARDOWN_SECONDS = 0.1  # for threads to be gone, where the system does not say that they are
LONGEST_TEARDOWN_SECONDS = 5.0  # where it does; a new thread may have got the number of an ended one

Batch = dict[str, Any]


class RowThreads:
    """Threads that share the rows of micro-batches; for `value_and_grad(..., row_threads=...)`.

    Args:
        num_threads: How many; the cores that this process may use is a good number. Fewer work where there are fewer
            slices, or where their float32 gradients would take more than 4 GiB beside the first's.
        slice_tokens: Rows go together up to so many tokens; a longer row goes alone. Default: 512.
        around: Makes a context within which the threads compute, in the caller's thread; to keep the BLAS from
            starting threads of its own, say. Default: none.
    """

    def __init__(
        self,
        num_threads: int,
        slice_tokens: int = SLICE_TOKENS,
        around: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.slice_tokens = slice_tokens
        self._num_threads = num_threads
        self._around = around
        started: list[threading.Thread] = []
        self._pool = ThreadPoolExecutor(
            num_threads, thread_name_prefix="rows", initializer=lambda: started.append(threading.current_thread())
        )
        self._tracing = threading.Lock()
        # Ends the threads; called by `close`, with this object's end, or at the process's exit, whichever is first.
        self._end = weakref.finalize(self, _end_threads, self._pool, started)

    def close(self) -> None:
        """End the threads; `sums` may not be called afterwards. Happens by itself once nobody holds this object."""
        self._end()

    def sums(self, model: nn.Module, loss_and_grad: Callable, batch: Batch) -> list[Any] | None:
        """[loss_sum, weight, grads] of a micro-batch, evaluated, or None where one thread would do all.

        Gradients have their parameters' dtypes. What a forward pass assigns to the model's arrays is lost.

        Args:
            model: What `loss_and_grad` is called with.
            loss_and_grad: `loss_and_grad(model, batch) -> ((loss_sum, weight), grads)`.
            batch: Every array in it has the rows as its first axis.

        Raises:
            ValueError: An array of `batch` has other rows than `batch["tokens"]`.
        """
        slices = self._slices(batch)
        number = min(self._num_threads, len(slices), _affordable(model))
        if number < 2:
            return None
        # A thread cannot compute what another one left lazy: weights, or what a module keeps beside them.
        mx.eval(slices, model)
        # Each thread has random numbers of its own, which do not depend on this one's.
        seeds = integers(mx.random.randint(0, 2**31 - 1, (len(slices),)))
        jobs, stop = list(zip(seeds, slices)), threading.Event()
        with self._around():
            work = [self._pool.submit(self._sum_of, jobs[i::number], model, loss_and_grad, stop) for i in range(number)]
            try:
                wait(work)  # for all of them, also when one fails: the others still use the model
            except BaseException:  # Ctrl-C
                stop.set()
                wait(work)
                raise
        total = work[0].result()
        for other in work[1:]:
            total = add_sums(total, other.result())
        total[2] = tree_map(lambda grad, weight: grad.astype(weight.dtype), total[2], model.trainable_parameters())
        mx.eval(total)
        return total

    def _slices(self, batch: Batch) -> list[Batch]:
        num_rows, num_tokens = batch["tokens"].shape
        for name, value in named_arrays(batch):
            if hasattr(value, "shape") and value.shape[:1] != (num_rows,):
                raise ValueError(
                    f"The batch's {name} has shape {tuple(value.shape)}; row_threads needs arrays whose first axis is "
                    f"the batch's {num_rows} rows."
                )
        step = max(1, self.slice_tokens // num_tokens)
        return [_rows_of(batch, slice(start, start + step)) for start in range(0, num_rows, step)]

    def _sum_of(
        self, jobs: Sequence[tuple[int, Batch]], model: nn.Module, loss_and_grad: Callable, stop: threading.Event
    ) -> list[Any]:
        total: list[Any] = []
        for seed, batch in jobs:
            if stop.is_set():
                break
            mx.random.seed(seed)
            total, outputs = self._traced(total or None, batch, model, loss_and_grad)
            _evaluate(outputs, *total)
        return total

    def _traced(
        self, total: Any, batch: Batch, model: nn.Module, loss_and_grad: Callable
    ) -> tuple[list[Any], list[Any]]:
        """`total` with the sums of one slice added, lazy, and what the layers returned on the way."""
        with self._tracing:
            own = named_arrays(model.parameters())
            # What a trace puts in their place belongs to this thread; after an error also that of frozen ones.
            with swapped(slots_of(model, [name for name, _ in own]), [array for _, array in own]):
                with _noted_outputs(getattr(model, "layers", [])) as outputs:
                    (loss, weight), grads = loss_and_grad(model, batch)
            return add_sums(total, [loss, weight, grads]), outputs


def _rows_of(batch: Batch, rows: slice) -> Batch:
    return tree_map(lambda value: value[rows] if hasattr(value, "shape") else value, batch)


def _end_threads(pool: ThreadPoolExecutor, threads: list[threading.Thread]) -> None:
    """Also waits until the threads have left the system: MLX ends their streams then, and aborts where the process ends
    meanwhile."""
    pool.shutdown()
    tasks = Path("/proc/self/task")
    if threads and not tasks.exists():
        time.sleep(TEARDOWN_SECONDS)
    deadline = time.monotonic() + LONGEST_TEARDOWN_SECONDS
    while any((tasks / str(thread.native_id)).exists() for thread in threads) and time.monotonic() < deadline:
        time.sleep(0.001)


def _affordable(model: nn.Module) -> int:
    """Threads whose gradients fit."""
    num_trainable = sum(weight.size for _, weight in named_arrays(model.trainable_parameters()))
    return 1 + EXTRA_GRADIENT_BYTES // max(num_trainable * mx.float32.size, 1)


@contextmanager
def _noted_outputs(layers: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """Within it, what the layers return is added to a list."""
    outputs: list[Any] = []
    classes = [type(layer) for layer in layers]
    for layer, cls in zip(layers, classes):
        layer.__class__ = overridden_class(cls, {"__call__": _noting(cls.__call__, outputs)})
    try:
        yield outputs
    finally:
        for layer, cls in zip(layers, classes):
            layer.__class__ = cls


def _noting(call: Callable, outputs: list[Any]) -> Callable:
    def noting_call(*args: Any, **kwargs: Any) -> Any:
        outputs.append(call(*args, **kwargs))
        return outputs[-1]

    return noting_call


def _evaluate(outputs: list[Any], loss: mx.array, weight: mx.array, grads: Any) -> None:
    """Evaluates what the layers returned, the loss, and gradients with the last layer's first: in many small steps.

    MLX lets all threads together run some 100 operations ahead. A thread that is asked for a whole pass at once takes
    all of them and leaves the others waiting.
    """
    outputs.reverse()
    while outputs:
        mx.eval(outputs.pop())
    mx.eval(loss, weight)
    for _, grad in reversed(named_arrays(grads)):
        mx.eval(grad)
