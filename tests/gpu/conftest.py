"""The scripts here import each other by their bare names, as they do when `run.py` starts them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
