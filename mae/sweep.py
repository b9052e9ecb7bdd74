"""`python -m mae.sweep`: see `mae.report.sweep`."""

import sys

from mae.report.sweep import main

if __name__ == "__main__":
    sys.exit(main())
