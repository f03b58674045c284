"""``python -m sdfit.campaign``."""

from sdfit.campaign.plan import main

raise SystemExit(main())
