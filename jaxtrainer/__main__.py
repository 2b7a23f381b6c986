"""`python -m jaxtrainer`: the command, of this interpreter."""

import sys

from jaxtrainer.cli import main

sys.exit(main())
