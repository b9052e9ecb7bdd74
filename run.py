"""Masked autoencoders, from a laptop to many nodes: see mae/cli.py.

python run.py                    pre-trains a small model on embedded data
python run.py --help             the groups to choose from
"""

import sys

from mae.cli import main

if __name__ == "__main__":
    sys.exit(main())
