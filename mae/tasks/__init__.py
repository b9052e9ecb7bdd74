"""The tasks, a small file each. `registry` names them, and `base` says what one that trains is made of."""
