"""`python -m mae.search`: see `mae.tools.search`."""

import sys

from mae.tools.search import main

if __name__ == "__main__":
    sys.exit(main())
