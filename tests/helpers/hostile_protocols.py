"""Opcodes, most of pickle protocols 1 and 3 to 5, that must be refused beside good weights."""

from tests.helpers.pickle_opcodes import get, put, raw

LATER = {
    "long name again and again": raw("a" * 50_000) + put(7) + (get(7) * 2 + b"\x93") * 2000,
    "tuple as a key": b"}" + raw((1, 2)) + b"Ns",
    "entries of a set": b"\x8f(" + raw("a") + raw("b") + b"u",
    "set in a dictionary's place": b"}(" + raw("a") + b"\x90",
    "bytearray of 2**60": b"\x96" + (1 << 60).to_bytes(8, "little"),
    "bytes of 2**60": b"\x8e" + (1 << 60).to_bytes(8, "little"),
    "frame in a frame": b"\x95" + bytes([40, *bytes(7)]) + b"\x95" + bytes([4, *bytes(7)]) + b"N" * 60,
    "name on the stack that is a number": raw(4) + raw(5) + b"\x93",
    "list as a key": b"}]Ns",
    "pops": b"N0",
    "long bytes": b"B\xff\xff\xff\xff" + b"a" * 20,
    "long of four gigabytes": b"\x8b\xff\xff\xff\x7f" + b"a" * 20,
    "frame": b"\x95" + b"\xff" * 8,
    "extension": b"\x82\x01",
    "persistent id in text": b"Pstorage\n",
}
