"""Writes seeds/{shard,table,list,classes}: small image sources of every kind. `pip install pyarrow && python make_source_seeds.py`"""
import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

SEEDS = Path(__file__).parent / "seeds"


def place(name):
    path = SEEDS / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def shard(name, members, format):
    with tarfile.open(place(f"shard/{name}.tar"), "w", format=format) as tar:
        for member, content in members.items():
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def table(name, columns, **options):
    pq.write_table(pa.table(columns), place(f"table/{name}.parquet"), **options)


members = {"0.png": b"image", "0.cls": b"1", "0.json": b'{"captions": ["a", "b"]}', "1.seg.png": b"mask", "1.txt": b"a\nb"}
shard("plain", members, tarfile.USTAR_FORMAT)
shard("long", {"d" * 120 + "/0.png": b"image", "d" * 120 + "/0.captions": b"a\nb"}, tarfile.GNU_FORMAT)
shard("pax", {"é" * 60 + ".png": b"image"}, tarfile.PAX_FORMAT)

images, labels = [b"one", None, b"three"], [1, 2, None]
table("bytes", {"image": images, "label": labels, "captions": [["a"], ["a", "b"], ["c"]]}, row_group_size=2)
table("struct", {"image": [{"bytes": b, "path": "a.png"} for b in images], "label": ["x", "y", "z"]}, write_page_index=True)
table("paths", {"path": ["a.png", "b.png"], "captions": ["a", "b"]}, compression="gzip")
table("plain", {"jpg": images, "key": ["a", "b", "c"]}, compression="none", use_dictionary=False)

place("list/plain.csv").write_text('path,label,captions\nlist.csv,a,"[""a"", ""b""]"\n')
place("list/urls.csv").write_text("file_name,pair\n/no/such.png,1\n'x',2\n")
place("classes/rows.csv").write_text("prompt,classname,classidx\na cat,cat,3\n\"a, dog\",dog,-1\n")
place("classes/lines.txt").write_text("cat\n\ndog\n")
