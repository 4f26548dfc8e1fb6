"""Writes a directory of images (CLASS/NAME.png) in the formats of other programs.

    python make.py IMAGES OUT

OUT/shards/digits-{0..2}.tar by webdataset (png, cls, json), OUT/hugging-face/*.parquet by datasets (image, label),
OUT/paths.parquet by pyarrow (path, label). All hold the images in the order of their paths.
"""
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import webdataset
from datasets import ClassLabel, Dataset, Features, Image

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def thirds(items):
    size = -(-len(items) // 3)
    return [items[i : i + size] for i in range(0, len(items), size)]


def main():
    images, out = Path(sys.argv[1]), Path(sys.argv[2])
    paths = sorted(images.rglob("*.png"), key=lambda path: path.relative_to(images).as_posix())
    (out / "shards").mkdir(parents=True)
    (out / "hugging-face").mkdir()
    for i, part in enumerate(thirds(paths)):
        with webdataset.TarWriter(str(out / "shards" / f"digits-{i}.tar")) as writer:
            for path in part:
                writer.write(
                    {
                        "__key__": f"{path.parent.name}/{path.stem}",
                        "png": path.read_bytes(),
                        "cls": NAMES.index(path.parent.name),
                        "json": {"name": path.parent.name},
                    }
                )
        features = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
        rows = {
            "image": [{"bytes": path.read_bytes(), "path": path.name} for path in part],
            "label": [NAMES.index(path.parent.name) for path in part],
        }
        Dataset.from_dict(rows, features=features).to_parquet(out / "hugging-face" / f"train-{i:05}.parquet", batch_size=4)
    relative = [str(path.resolve()) for path in paths]
    pq.write_table(pa.table({"path": relative, "label": [path.parent.name for path in paths]}), out / "paths.parquet")


if __name__ == "__main__":
    main()
