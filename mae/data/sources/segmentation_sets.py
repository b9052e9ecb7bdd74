"""Published data sets of segmentation, in the layouts in which their authors or torchvision ship them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mae.data.decode import Decoder
from mae.data.paths import entries_of, given_root, printable, text_lines
from mae.data.settings import Split
from mae.data.source import IGNORED, Source
from mae.data.sources.segmentation import NO_CLASS, Segmented, tree_files
from mae.errors import UserError

# VOC2012's devkit_doc, section "Classes", in the order of the maps' values; 0 is the background, 255 the border
VOC_CLASSES = [
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
]
# cityscapesScripts, helpers/labels.py: `id` of the 19 labels whose `trainId` is 0, 1, ... 18; the others are ignored
CITYSCAPES_IDS = {
    "road": 7,
    "sidewalk": 8,
    "building": 11,
    "wall": 12,
    "fence": 13,
    "pole": 17,
    "traffic light": 19,
    "traffic sign": 20,
    "vegetation": 21,
    "terrain": 22,
    "sky": 23,
    "person": 24,
    "rider": 25,
    "car": 26,
    "truck": 27,
    "bus": 28,
    "train": 31,
    "motorcycle": 32,
    "bicycle": 33,
}
CITYSCAPES_LABELS = 34  # ids 0 to 33; the licence plate's -1 is never drawn
ADE20K_CLASSES = 150
ADE20K_NAMES = "objectInfo150.txt"  # tab-separated, with a header: number from 1, share of pixels, ..., names
PETS_CLASSES = ["pet", "background", "border"]  # annotations/README of the archive: 1 foreground, 2 background, 3 not
BORDER = 3  # classified


def ade20k(split: Split, *, root: str | None, decoder: Decoder) -> Source:
    """ADE20K of the Scene Parsing Challenge 2016 (Zhou et al., CVPR 2017): 150 classes, 20,210 and 2,000 images.

    Value 0 of its maps is "other objects", which the challenge does not count, and k is class k - 1.
    """
    top = unpacked(root, "ADEChallengeData2016", "images")
    folder = ("training", "validation")[split == "val"]
    images = files_in(top, f"images/{folder}", ".jpg")
    maps = [top / "annotations" / folder / f"{path.stem}.png" for path in images]
    names = ade20k_names(top / ADE20K_NAMES)
    return segmented_files(top, images, maps, names, value_classes(range(1, ADE20K_CLASSES + 1), ignored=[0]), decoder)


def voc2012(split: Split, *, root: str | None, sets: list[str], map_folder: str, decoder: Decoder) -> Source:
    """PASCAL VOC 2012 (Everingham et al., IJCV 2015), as its devkit and torchvision unpack it: 21 classes.

    `sets` are the lists of ImageSets/Segmentation that stand for training and validation: 1,464 and 1,449 images. With
    SBD's further maps (10,582 images) they are `[trainaug, val]`, in the folder `SegmentationClassAug`.
    """
    top = unpacked(root, "VOCdevkit/VOC2012", "JPEGImages")
    names = listed_names(top, f"ImageSets/Segmentation/{sets[split == 'val']}.txt")
    images = [top / "JPEGImages" / f"{name}.jpg" for name in names]
    maps = [top / map_folder / f"{name}.png" for name in names]
    return segmented_files(
        top, images, maps, VOC_CLASSES, value_classes(range(len(VOC_CLASSES)), ignored=[255]), decoder
    )


def cityscapes(split: Split, *, root: str | None, decoder: Decoder) -> Source:
    """Cityscapes' fine annotations (Cordts et al., CVPR 2016): the 19 classes of its evaluation, 2,975 and 500 images.

    Read are the maps that the authors ship (`*_gtFine_labelIds.png`), whose ids are turned into `trainId`.
    """
    top = unpacked(root, "cityscapes", "leftImg8bit")
    end = "_leftImg8bit.png"
    images = files_in(top, f"leftImg8bit/{split}", end)
    maps = [
        top / "gtFine" / split / path.parent.name / f"{path.name.removesuffix(end)}_gtFine_labelIds.png"
        for path in images
    ]
    ids = list(CITYSCAPES_IDS.values())
    others = [label for label in range(CITYSCAPES_LABELS) if label not in ids]
    return segmented_files(top, images, maps, list(CITYSCAPES_IDS), value_classes(ids, ignored=others), decoder)


def oxford_pets(split: Split, *, root: str | None, ignore_border: bool, decoder: Decoder) -> Source:
    """Oxford-IIIT Pet (Parkhi et al., CVPR 2012): pet and background, of 3,680 and 3,669 images (trainval, test).

    The third value of its trimaps is "not classified", along the outline: ignored, or without `ignore_border` a class.
    """
    top = unpacked(root, "oxford-iiit-pet", "images")
    lines = listed_names(top, f"annotations/{'test' if split == 'val' else 'trainval'}.txt")
    names = [line.split()[0] for line in lines]
    images = [top / "images" / f"{name}.jpg" for name in names]
    maps = [top / "annotations" / "trimaps" / f"{name}.png" for name in names]
    classes = PETS_CLASSES[:-1] if ignore_border else PETS_CLASSES
    ignored = [BORDER] if ignore_border else []
    return segmented_files(top, images, maps, classes, value_classes(range(1, len(classes) + 1), ignored), decoder)


# ---------------------------------------------------------------- what they share


def unpacked(root: str | None, archive: str, needed: str) -> Path:
    """The folder that holds `needed`: data.root, or what an archive unpacks to in it. Raises UserError."""
    top = given_root(root)
    for folder in (top, top / archive):
        if (folder / needed).is_dir():
            return folder
    raise UserError(f"data.root={root} has no folder {needed}, nor {archive}/{needed}: unpack the archives there.")


def files_in(top: Path, folder: str, end: str) -> list[Path]:
    """The files under a folder whose names end so, sorted. Raises UserError where there are none."""
    paths = tree_files(top / folder, (end,)) if (top / folder).is_dir() else []
    files = [path for path in paths if path.name.endswith(end)]
    if not files:
        raise UserError(f"data.root: {top / folder} holds no file *{end}: unpack the archives there.")
    return files


def listed_names(top: Path, file: str) -> list[str]:
    """The lines of a list of images, without comments. Raises UserError where the list is missing or empty."""
    path = top / file
    lines = [line.strip() for line in text_lines(path, f"data.root: the list of images {path}")]
    names = [line for line in lines if line and not line.startswith("#")]
    if not names:
        raise UserError(f"data.root: the list of images {path} is empty.")
    return names


def segmented_files(
    top: Path, images: Sequence[Path], maps: Sequence[Path], classes: list[str], table: np.ndarray, decoder: Decoder
) -> Segmented:
    """Images with maps, all of which are looked for. Raises UserError that counts and names those that are missing."""
    folders = {path.parent for path in (*images, *maps)}
    present = {folder / entry.name for folder in folders if folder.is_dir() for entry in entries_of(folder)}
    for paths, kind in ((images, "images"), (maps, "maps")):
        if missing := [path for path in paths if path not in present]:
            raise UserError(
                f"data.root: {len(missing)} of {len(paths)} {kind} are missing, such as {printable(str(missing[0]))}: "
                "unpack the archives there."
            )
    return Segmented(top, images, maps, classes, table, decoder)


def value_classes(values: Sequence[int], ignored: Sequence[int]) -> np.ndarray:
    """The class of each value of a map (256,) int64: `values` are those of class 0, 1, ...; others are NO_CLASS."""
    table = np.full(256, NO_CLASS, np.int64)
    table[list(values)] = np.arange(len(values))
    table[list(ignored)] = IGNORED
    return table


def ade20k_names(file: Path) -> list[str]:
    """The first name of each class in `objectInfo150.txt`; numbers from 1 where the archive came without it.

    Raises UserError where the file has another number of classes.
    """
    if not file.is_file():
        return [str(number) for number in range(1, ADE20K_CLASSES + 1)]
    rows = [line.split("\t") for line in text_lines(file, f"data.root: {file}")[1:] if line.strip()]
    if len(rows) != ADE20K_CLASSES:
        raise UserError(f"data.root: {file} names {len(rows)} classes, where ADE20K has {ADE20K_CLASSES}.")
    return [row[-1].split(",")[0].strip() for row in rows]
