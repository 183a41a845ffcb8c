"""``python -m luthier`` is the command line."""

import sys

from luthier.cli import main

sys.exit(main())
