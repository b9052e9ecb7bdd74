"""Kinds of image files that are decoded, and their suffixes, as far as the Pillow that is installed goes."""

from PIL import Image

# Pillow would start Ghostscript for a file that is PostScript whatever its name says
Image.init()
WANTED = ("JPEG", "MPO", "PNG", "WEBP", "TIFF", "BMP", "DIB", "GIF", "PPM", "JPEG2000", "AVIF", "ICO", "TGA", "PCX")
KINDS = [kind for kind in WANTED if kind in Image.OPEN]
COMMON = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
OTHERS = {suffix for suffix, kind in Image.registered_extensions().items() if kind in (*KINDS, "MPO")}  # MPO is a JPEG
SUFFIXES = (*COMMON, *sorted(OTHERS - {*COMMON}))
