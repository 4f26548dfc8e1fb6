"""Writes seeds/image: a file of every format and kind, as small as possible. `pip install pillow simplejpeg && python make_seeds.py`"""
import sys
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests/fixtures/preprocess"))
from real_shaped import oriented, photograph, write_png, ycck

OUT = HERE / "seeds/image"
OUT.mkdir(parents=True, exist_ok=True)
photo = photograph(np.random.default_rng(2), 9, 13)
gray = photo.convert("L")
alpha = photo.convert("RGBA")
alpha.putalpha(gray)
for name, image, options in [
    ("baseline.jpg", photo, {"quality": 30}),
    ("progressive.jpg", photo, {"quality": 30, "progressive": True}),
    ("restart.jpg", photo.resize((33, 20)), {"quality": 20, "restart_marker_blocks": 1}),
    ("gray.jpg", gray, {"quality": 30}),
    ("turned.jpg", photo, {"quality": 30, "exif": oriented(6)}),
    ("cmyk.jpg", photo.convert("CMYK"), {"quality": 30}),
    ("rgb.png", photo, {}),
    ("palette.png", photo.quantize(4), {"transparency": bytes([0, 99, 255, 255])}),
    ("bilevel.png", photo.convert("1"), {}),
    ("alpha.png", alpha, {}),
    ("first.gif", photo.quantize(4), {"save_all": True, "append_images": [photo.transpose(0).quantize(4)]}),
    ("lossy.webp", photo, {"quality": 20}),
    ("lossless.webp", photo, {"lossless": True}),
    ("alpha.webp", alpha, {"quality": 20}),
    ("animated.webp", photo, {"save_all": True, "append_images": [photo.transpose(0)], "quality": 20}),
    ("rgb.bmp", photo, {}),
    ("palette.bmp", photo.quantize(4), {}),
    ("rgb.ppm", photo, {}),
    ("gray.pgm", gray, {}),
    ("bilevel.pbm", photo.convert("1"), {}),
    ("raw.tiff", photo, {}),
    ("lzw.tiff", photo, {"compression": "tiff_lzw"}),
    ("deflate.tiff", gray, {"compression": "tiff_adobe_deflate"}),
    ("packbits.tiff", photo.convert("1"), {"compression": "packbits"}),
    ("cmyk.tiff", photo.convert("CMYK"), {}),
    ("float.tiff", gray.convert("F"), {}),
]:
    image.save(OUT / name, **options)
ycck(OUT / "ycck.jpg", photo.convert("CMYK"))
write_png(OUT / "interlaced16.png", np.asarray(alpha).astype(">u2") * 257, 16, interlaced=True)
