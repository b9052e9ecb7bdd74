"""What a program says when it ends otherwise than its user wanted. Imports no torch."""


class UserError(ValueError):
    """A mistake that a user can mend, in a sentence or two: what is wrong with its full key or file, then what to type.

    Every other exception is a bug of this program.
    """
