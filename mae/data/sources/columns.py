"""Columns of Parquet and Arrow files: whether they hold images and labels, and labels as numbers."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from mae.data.source import UNLABELLED
from mae.errors import UserError

if TYPE_CHECKING:
    from pyarrow import DataType, Schema


@dataclass(frozen=True)
class Columns:
    """The columns that are read."""

    image_column: str
    label_column: str | None

    def check(self, schema: "Schema", file: str | None = None) -> Literal["text", "numbers"] | None:
        """What the labels of a data set, or of one file of it, are; None for no labels.

        Raises UserError where a column is missing or holds no images or labels."""
        from pyarrow import types

        for key, column in (("image_column", self.image_column), ("label_column", self.label_column)):
            if column is not None and column not in schema.names:
                columns = f"the columns of {file}" if file else "its columns"
                raise UserError(f"data.{key}={column} is not one of {columns}: {', '.join(schema.names)}.")
        of = f" of {file}" if file else ""
        kind = schema.field(self.image_column).type
        if not _holds_images(kind):
            table = " Images that a table names by their paths are read with data=table." if is_text(kind) else ""
            raise UserError(
                f"data.image_column={self.image_column}{of} holds {kind}, and not encoded images: binary, or a struct "
                f"of bytes and path.{table}"
            )
        if self.label_column is None:
            return None
        kind = schema.field(self.label_column).type
        kind = kind.value_type if types.is_dictionary(kind) else kind
        if types.is_nested(kind) or _is_binary(kind):
            raise UserError(
                f"data.label_column={self.label_column}{of} holds {kind}, and a label is one number or word: choose "
                "another column, or data.label_column=null to read no labels."
            )
        return None if types.is_null(kind) else "text" if is_text(kind) else "numbers"


def is_text(kind: "DataType") -> bool:
    """Whether a column of this type holds text."""
    from pyarrow import types

    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_binary(kind: "DataType") -> bool:
    from pyarrow import types

    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)


def _holds_images(kind: "DataType") -> bool:
    from pyarrow import types

    if not types.is_struct(kind):
        return _is_binary(kind)
    fields = {field.name: field.type for field in kind}
    return "bytes" in fields and _is_binary(fields["bytes"]) or "path" in fields and is_text(fields["path"])


def class_names(schema: "Schema", label: str | None, file: str) -> list[str] | None:
    """The names of the classes as `datasets` writes them, or None. Raises UserError where they cannot be read."""
    try:
        about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = about.get("info", {}).get("features", {}).get(label, {}).get("names")
        return None if names is None else [str(name) for name in names]
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"what {file} says of its features (its metadata huggingface) cannot be read.") from error


def agree(files: list[str], kinds: list[str | None], names: list[list[str] | None], label: str) -> list[str] | None:
    """The names of the classes in all files. Raises UserError where files have labels of other kinds or names."""
    for values, what in ((kinds, "labels of another kind"), (names, "other classes")):
        first = next((number for number, value in enumerate(values) if value is not None), 0)
        for name, value in zip(files, values, strict=True):
            if value is not None and value != values[first]:
                raise UserError(f"data.label_column={label}: {name} has {what} than {files[first]}.")
    return next((value for value in names if value is not None), None)


def numbered(values: np.ndarray, names: list[str] | None) -> tuple[np.ndarray, list[str]]:
    """Labels as numbers, and their names: those given, or the sorted values. A row without one (null) has -1.

    Raises UserError for a label that is none of the names."""
    missing = np.array([value is None for value in values], bool) if values.dtype == object else values != values
    present, labels = values[~missing], np.full(len(values), UNLABELLED, np.int64)
    if present.dtype.kind == "f" and missing.any() and (present == present.astype(np.int64)).all():  # nulls among ints
        present = present.astype(np.int64)
    if names is None:
        known, labels[~missing] = np.unique(present, return_inverse=True)
        return labels, [str(k) for k in known]
    if present.dtype.kind in "OU" and any(isinstance(value, str) for value in present):
        number = {name: k for k, name in enumerate(names)}
        numbers = np.array([number.get(str(value), len(names)) for value in present], np.int64)
    else:
        numbers = present.astype(np.int64)
    strange = (numbers < UNLABELLED) | (numbers >= len(names))
    if strange.any():
        raise UserError(
            f"data.label_column: the label {present[strange][0]} is none of the {len(names)} classes that the data set "
            "names."
        )
    labels[~missing] = numbers
    return labels, list(names)
