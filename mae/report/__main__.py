"""`python -m mae.report`: see `mae.report.run`."""

import sys

from mae.report.run import main

if __name__ == "__main__":
    sys.exit(main())
