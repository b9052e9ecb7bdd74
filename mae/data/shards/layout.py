"""How the files of a shard form samples, in the WebDataset layout, and notes on what is not used."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from mae.data.formats import SUFFIXES
from mae.errors import UserError


@dataclass(frozen=True)
class Layout:
    """How the files of a shard form samples."""

    image_key: str | None = None  # suffix of each sample's image; None: its only image file
    label_key: str | None = None  # suffix of each sample's label; None: cls
    sample_key: Literal["first_dot", "last_dot"] = "first_dot"  # where the name of a sample ends

    def plain(self) -> "Layout":
        """The suffixes as members of shards are compared with them: in lower case, without a dot before them."""
        image, label = (key and key.lower().lstrip(".") for key in (self.image_key, self.label_key))
        return Layout(image, label, self.sample_key)

    def split(self, base: str) -> tuple[str, str]:
        """A file's name as the name of its sample and its suffix, in lower case and without a dot."""
        stem, _, suffix = base.partition(".") if self.sample_key == "first_dot" else base.rpartition(".")
        return (stem, suffix.lower()) if stem else (base, "")

    def image(self, suffixes: list[str], key: str, shard: str) -> str | None:
        """The one of a sample's images that is taken; None where it has none. Raises UserError for several."""
        if self.image_key is not None:
            return self.image_key if self.image_key in suffixes else None
        exact = [suffix for suffix in suffixes if f".{suffix}" in SUFFIXES]
        candidates = exact or suffixes
        if len(candidates) > 1:
            files = ", ".join(f"{key}.{suffix}" for suffix in candidates[:3])
            more = f" and {len(candidates) - 3} more" if len(candidates) > 3 else ""
            other_reading = "" if exact else self.other_reading("each image")
            raise UserError(
                f"the sample {key} of the shard {shard} has several images ({files}{more}): choose by "
                f"data.image_key={candidates[0]}{other_reading}."
            )
        return candidates[0] if candidates else None

    def other_reading(self, what: str) -> str:
        """What to type where the names of samples have dots themselves."""
        if self.sample_key == "last_dot":
            return ""
        return f", or data.sample_key=last_dot if {what} is a sample of its own whose name has dots"


DEFAULT = Layout()


@dataclass
class Notes:
    """What of a shard is not used."""

    beside: Counter[str] = field(default_factory=Counter)  # suffix -> files beside the image and label of a sample
    without_image: int = 0  # samples that lack the image that others have
    labels_alone: int = 0  # labels without an image

    def __iadd__(self, other: "Notes") -> "Notes":
        self.beside += other.beside
        self.without_image += other.without_image
        self.labels_alone += other.labels_alone
        return self

    def sentences(self) -> list[str]:
        """One for each kind."""
        kinds = [f"{suffix} ({count})" for suffix, count in self.beside.most_common(3)]
        more = f" and {len(self.beside) - 3} more kinds" if len(self.beside) > 3 else ""
        all_sentences = [
            (kinds, f"files beside the image of a sample are not read: {', '.join(kinds)}{more} (data.image_key)"),
            (self.without_image, f"{self.without_image} samples lack the image that others have: they are left out"),
            (self.labels_alone, f"{self.labels_alone} labels belong to no image: they are left out"),
        ]
        return [sentence for count, sentence in all_sentences if count]
