"""Writes JPEGs for benchmarks where no photos are at hand: crops of scikit-learn's two sample photos.

python benchmarks/photos.py DIR --count 240
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

SIZE = (500, 375)  # of most of ImageNet's


def write_photos(folder: Path, count: int) -> None:
    """So many different crops, mirrored and turned by chance, at the size and quality of ImageNet's files."""
    random, originals = np.random.default_rng(0), [Image.fromarray(image) for image in load_sample_images().images]
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        photo = originals[number % len(originals)]
        width = int(random.uniform(0.5, 1.0) * min(photo.width, photo.height * SIZE[0] / SIZE[1]))
        height = int(width * SIZE[1] / SIZE[0])
        left, top = (int(random.integers(rest + 1)) for rest in (photo.width - width, photo.height - height))
        crop = photo.resize(SIZE, Image.Resampling.BICUBIC, (left, top, left + width, top + height))
        turned = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else crop
        turned.save(folder / f"{number:05}.jpg", quality=95)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=240)
    args = parser.parse_args()
    write_photos(args.folder, args.count)
    print(f"{args.count} JPEGs of {SIZE[0]} x {SIZE[1]} in {args.folder}")


if __name__ == "__main__":
    main()
