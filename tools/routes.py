"""`python tools/routes.py ...` is `linescan routes ...`, also under torchrun and without an installation."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.argv.insert(1, "routes")

from linescan.cli import main  # noqa: E402

main()
