"""Image files that are named one by one or by patterns, and the decoder of a data set's files."""

import glob
import os
from collections.abc import Iterator, Sequence

from omegaconf import DictConfig, OmegaConf

from mae.config.build import call
from mae.config.compose import CONF
from mae.data.decode import Decoder
from mae.data.paths import printable
from mae.data.source import BadImage, Decode, Encoded
from mae.data.sources.folder import read
from mae.data.sources.scientific import BANDS, Bands
from mae.errors import UserError


class NamedFiles(Encoded):
    """Unlabelled image files, in the order in which they are named."""

    def __init__(self, paths: Sequence[str], decoder: Decode):
        self.paths, self.decoder, self.classes = paths, decoder, []

    def __len__(self) -> int:
        return len(self.paths)

    def raw(self, index: int) -> bytearray:
        try:
            return read(self.paths[index], getattr(self.decoder, "most_bytes", None))
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror or error}") from error

    def name(self, index: int) -> str:
        return printable(self.paths[index])


def named_files(names: Sequence[str], data: DictConfig) -> NamedFiles:
    """The files of `task.files`, each once, decoded as those of the group `data`. Raises UserError for none."""
    paths = list(dict.fromkeys(path for name in names for path in _matching(name)))
    if not paths:
        raise UserError("task.files names no file: give paths or patterns, as task.files=[a.jpg,'photos/*.png'].")
    return NamedFiles(paths, decoder_of(data))


def _matching(name: str) -> Iterator[str]:
    """The file of that name, or those that match it as a pattern, sorted."""
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        raise UserError(f"task.files names the folder {name}: type data=folder data.root={name}, or {name}/*.jpg.")
    if os.path.exists(path):
        return iter([path])
    matches = [match for match in sorted(glob.glob(path, recursive=True)) if not os.path.isdir(match)]
    if not matches:
        what = "which matches no file" if glob.has_magic(path) else "which does not exist"
        raise UserError(f"task.files names {name}, {what}.")
    return iter(matches)


def decoder_of(data: DictConfig) -> Decoder | Bands:
    """What decodes files as those of a group `data`; photos, where its images are no files."""
    keys = OmegaConf.merge(OmegaConf.load(CONF / "data" / "shared" / "files.yaml"), data)
    assert isinstance(keys, DictConfig)
    return call(Bands if data.name in BANDS else Decoder, keys)
