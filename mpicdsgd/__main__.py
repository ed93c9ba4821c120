"""``python -m mpicdsgd``."""

import sys

from mpicdsgd.cli import main

sys.exit(main())
