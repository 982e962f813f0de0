"""python -m ftrun is the command ftrun."""

import sys

from ftrun.cli import main

sys.exit(main())
