"""``python -m sdfit.cli``."""

from sdfit.cli import main

raise SystemExit(main())
