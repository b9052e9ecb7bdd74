"""One packed file: images encoded and written beside, hashed on the way, flushed and renamed into place."""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image

from mae.data.shards.tar import Collector, Members
from mae.data.source import FAILURES, BadImage, Source, reason
from mae.errors import UserError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

KINDS = {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp", b"GI": "gif", b"BM": "bmp", b"II": "tif", b"MM": "tif"}
GROUP = 100  # rows of a Parquet row group: some 10 MB of photos, as `datasets` writes images


class Form(NamedTuple):
    """How images are written."""

    size: int | None  # pixels of the shorter side, or None to keep the files as they are
    quality: int  # of JPEG, where they are encoded anew


class Written(NamedTuple):
    """A file that was written."""

    num_images: int
    bad: list[tuple[int, str, str]]  # images left out: index, name, reason
    sha256: str
    members: Members | None  # where the images lie; None where the file says it itself


def encoded(source: Source, index: int, form: Form) -> bytes:
    """The file of an image. Raises BadImage or OSError, and UserError where its target is no class."""
    image, target = source[index]  # decoded in any case: a damaged file shall not be packed
    if isinstance(target, torch.Tensor):
        raise UserError("packed files hold images and their classes, and the targets of these images are no classes.")
    if form.size is None and (data := source.raw(index)) is not None:
        return bytes(data)
    if image.dtype != torch.uint8 or image.shape[0] not in (1, 3, 4):
        raise BadImage(f"{image.shape[0]} channels of {image.dtype} do not fit an image file")
    pixels = image.permute(1, 2, 0).squeeze(-1).contiguous().numpy()
    picture = Image.fromarray(pixels)
    if form.size is not None and min(picture.size) > form.size:
        scale = form.size / min(picture.size)
        width, height = (max(form.size, round(side * scale)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    if form.size is None or picture.mode == "RGBA":
        picture.save(out, "PNG")
    else:
        picture.save(out, "JPEG", quality=form.quality)
    return out.getvalue()


class Images:
    """The images of a file that can be used, in order: (index, label, file); those that cannot are noted."""

    def __init__(self, source: Source, indices: np.ndarray, form: Form):
        self.source, self.indices, self.form = source, indices, form
        self.bad: list[tuple[int, str, str]] = []

    def __iter__(self) -> Iterator[tuple[int, int, bytes]]:
        labels = self.source.labels
        for index in self.indices.tolist():
            try:
                data = encoded(self.source, index, self.form)
            except FAILURES as error:
                self.bad.append((index, self.source.name(index), reason(error)))
                continue
            yield index, -1 if labels is None else int(labels[index]), data


class Hashed(io.RawIOBase):
    """A file to write to, and the SHA-256 of what was written."""

    def __init__(self, file: BinaryIO):
        self.file, self.digest, self.at = file, hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def write(self, data: "ReadableBuffer") -> int:
        self.digest.update(data)
        self.file.write(data)
        self.at += memoryview(data).nbytes
        return memoryview(data).nbytes


def write_tar(file: Hashed, images: Images) -> Members:
    """A shard in the WebDataset layout."""
    members = Collector()

    def put(name: str, data: bytes) -> int:
        head = tarfile.TarInfo(name)
        head.size, head.mtime, head.mode = len(data), 0, 0o644
        start = file.tell()
        file.write(head.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE))
        return start + tarfile.BLOCKSIZE

    for index, label, data in images:
        key = f"{index:010}"
        offset = put(f"{key}.{KINDS.get(data[:2], 'img')}", data)
        if label >= 0:
            put(f"{key}.cls", str(label).encode())
        members.add(key, offset, len(data), label)
    file.write(bytes(2 * tarfile.BLOCKSIZE))
    return members.members()


def write_parquet(file: Hashed, images: Images) -> None:
    """A Parquet file that `datasets` reads: columns image (bytes and a name) and, where labelled, label."""
    import pyarrow
    from pyarrow import parquet

    labelled, classes = images.source.labels is not None, images.source.classes
    features: dict[str, object] = {"image": {"_type": "Image"}}
    columns = [("image", pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]))]
    if labelled:
        features["label"] = {"names": classes, "_type": "ClassLabel"}
        columns.append(("label", pyarrow.int64()))
    schema = pyarrow.schema(columns, {"huggingface": json.dumps({"info": {"features": features}})})
    rows: list[Mapping[str, object]] = []
    # images are compressed already
    with parquet.ParquetWriter(file, schema, compression="none", use_dictionary=False) as writer:
        for index, label, data in images:
            name = f"{index:010}.{KINDS.get(data[:2], 'img')}"
            rows.append({"image": {"bytes": data, "path": name}} | ({"label": label} if labelled else {}))
            if len(rows) == GROUP:
                writer.write_table(pyarrow.Table.from_pylist(rows, schema))
                rows = []
        if rows:
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))


WRITERS: dict[str, Callable[[Hashed, Images], Members | None]] = {"tar": write_tar, "parquet": write_parquet}


def write_file(source: Source, indices: np.ndarray, path: Path, form: Form) -> Written:
    """The images of these numbers as one file, of the kind that its name says."""
    images, temporary = Images(source, indices, form), path.with_name(f"{path.name}.part")
    with open(temporary, "wb") as file:
        hashed = Hashed(file)
        members = WRITERS[path.suffix[1:]](hashed, images)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return Written(len(indices) - len(images.bad), images.bad, hashed.digest.hexdigest(), members)
