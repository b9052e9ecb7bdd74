"""Data: sources of images (one YAML and one function each), decoding, resumable sampling, loading."""

from mae.data.shards.source import tar_shards
from mae.data.sources.digit_scenes import digit_scenes
from mae.data.sources.folder import classes_of, image_folder
from mae.data.sources.huggingface import hf
from mae.data.sources.robustness import robustness
from mae.data.sources.scientific import scientific_folder
from mae.data.sources.segmentation import segmentation_bands, segmentation_folder
from mae.data.sources.segmentation_sets import ade20k, cityscapes, oxford_pets, voc2012
from mae.data.sources.table import table
from mae.data.sources.torchvision import cifar10, cifar100, digits, fashion_mnist, stl10

SOURCES = {
    "digits": digits,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "stl10": stl10,
    "fashion_mnist": fashion_mnist,
    "folder": image_folder,
    "cifar10_folder": image_folder,
    "imagenet": classes_of,
    "imagenet_100": classes_of,
    "inat": classes_of,
    "places": classes_of,
    "table": table,
    "hf": hf,
    "imagenet_a": robustness,
    "imagenet_c": robustness,
    "imagenet_r": robustness,
    "imagenet_sketch": robustness,
    "imagenet_v2": robustness,
    "scientific": scientific_folder,
    "shards": tar_shards,
    "digit_scenes": digit_scenes,
    "segmentation_folder": segmentation_folder,
    "segmentation_bands": segmentation_bands,
    "ade20k": ade20k,
    "cityscapes": cityscapes,
    "oxford_pets": oxford_pets,
    "voc2012": voc2012,
}
