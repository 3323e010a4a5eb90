"""``python -m megarat`` is the ``megarat`` command."""

import sys

from megarat.cli import main

sys.exit(main())
