"""Lets these tests import their helpers and workers by name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
