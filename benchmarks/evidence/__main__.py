"""`python -m benchmarks.evidence`: see `suite`."""

from .suite import main

raise SystemExit(main())
