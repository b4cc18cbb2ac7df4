"""Several commands of the trainer on every rank, one after the other. Argument: name to arguments, as JSON."""

import contextlib
import io
import json
import sys

from trainer.__main__ import main

printed = {}
for name, arguments in json.loads(sys.argv[1]).items():
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(arguments)
    assert code == 0, f"{name} left with exit code {code}"
    printed[name] = out.getvalue()
print("RESULT " + json.dumps(printed), flush=True)
