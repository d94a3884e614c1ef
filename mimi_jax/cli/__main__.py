"""`python -m mimi_jax.cli` is `mimi-jax`."""

import sys

from mimi_jax.cli import main

sys.exit(main())
