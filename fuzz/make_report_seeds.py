"""Writes seeds/report: worker messages for the target `report`, each preceded by its kind and its length."""
import struct
from pathlib import Path

OUT = Path(__file__).parent / "seeds/report"
OUT.mkdir(parents=True, exist_ok=True)


def varint(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out + bytes([value]))


def number(field, value):
    return varint(field << 3) + varint(value) if value else b""


def text(field, value):
    return varint(field << 3 | 2) + varint(len(value)) + value


def doubles(field, values):
    return text(field, struct.pack(f"<{len(values)}d", *values))


def message(kind, body):
    return bytes([kind, len(body)]) + body


def result(sample, round, prompts, slots, sums):
    unit = number(1, sample) + number(2, round)
    packed = b"".join(map(varint, prompts))
    return text(1, unit) + text(2, packed) + number(3, slots) + doubles(4, sums) + doubles(5, [s * s for s in sums])


def report(lease, *results, failures=b""):
    return message(0, text(1, b"a") + number(2, 2) + number(3, lease) + b"".join(text(4, r) for r in results) + failures)


lease = message(1, text(1, b"a") + varint(2 << 3 | 1) + struct.pack("<d", 10.0))
first = [result(sample, 0, [0, 1, 2], 2, [1.0, 2.0, 3.0]) for sample in range(3)]
second = [result(sample, 1, [0, 1], 2, [1.0, 2.0]) for sample in range(3)]
failure = text(5, number(1, 1) + text(2, b"decode") + text(3, b"broken"))
seeds = {
    "rounds": lease + report(0, first[0]) + lease * 2 + report(1, first[1], first[2]) + report(1, *second),
    "twice": lease + report(0, first[0]) + report(0, first[0]),
    "failure": lease + report(0, failures=failure) + report(0, first[1]),
    "release": lease + message(2, text(1, b"a") + number(2, 2) + text(3, b"\0")) + lease,
    "fails": (lease + message(2, text(3, b"\0\1\2\3") + text(4, b"poison"))) * 4,
    "join": message(3, number(1, 4) + text(2, b"a") + text(3, b"host\n")),
}
for name, content in seeds.items():
    (OUT / name).write_bytes(content)
