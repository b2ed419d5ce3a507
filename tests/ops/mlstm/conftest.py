"""Makes the shared case table importable as ``cases`` from the test modules of this folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
