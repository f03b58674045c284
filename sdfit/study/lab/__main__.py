"""``python -m sdfit.study.lab``."""

from sdfit.study.lab.campaign import main

raise SystemExit(main())
