"""``python -m mpicdsgd``."""

import sys

from mpicdsgd.cli.parser import main

sys.exit(main())
