import sys

from mimi_jax.cli.main import main

sys.exit(main())
