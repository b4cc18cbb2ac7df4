"""Paths of the tiny models that other tests' workers share."""

import sys

from ranks import ROOT

sys.path.insert(0, str(ROOT / "tests" / "parallel" / "tensor"))
