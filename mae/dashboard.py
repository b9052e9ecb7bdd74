"""`python -m mae.dashboard`: see `mae.tools.workspace`."""

import sys

from mae.tools.workspace import main

if __name__ == "__main__":
    sys.exit(main())
