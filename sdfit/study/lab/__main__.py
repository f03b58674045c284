"""``python -m sdfit.study.lab``."""

from sdfit.study.lab.commands import main

raise SystemExit(main())
