"""Runs the examples in the docstrings of `comm.Group` as rank 0 of two would; other ranks take part in silence."""

import doctest
import sys

import mlx.core as mx

import comm
from comm.group import Group

group = comm.init()
names = ["all_sum", "all_max", "all_gather", "reduce_scatter", "broadcast", "send"]
wrong = 0
for name in names:
    examples = doctest.DocTestParser().get_doctest(
        getattr(Group, name).__doc__, {"group": group, "mx": mx}, name, None, None
    )
    assert examples.examples, f"{name} has no example"
    runner = doctest.DocTestRunner(verbose=False)
    runner.run(examples, out=sys.stderr.write if group.rank == 0 else lambda text: None)
    wrong += runner.failures if group.rank == 0 else 0
print(f"RESULT {wrong}", flush=True)
