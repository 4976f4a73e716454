"""Lets the tests of this folder, and the programs that they start, share fake_tasks."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
