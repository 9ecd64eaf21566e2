"""Metadata and headers of safetensors files that a stranger might write; tests/helpers/hostile_weights.py makes files of them."""

import json

from tests.helpers.pickle_opcodes import safetensors

CLASSES = ["blue", "green", "red"]
CROP = {"crop": 32, "resize": 36, "interpolation": "bilinear", "mode": "center", "fill": [1, 2, 3]}
METADATA = {
    **{"model": "hostile_net", "num_classes": 3, "classes": CLASSES, "img_size": 32},
    **{"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "evaluation": CROP},
}
# Metadata in place of the good ones; those that JSON can state are tried in safetensors too.
FACTS = {
    **{f"classes {value!r}"[:40]: {"classes": value} for value in ("abc", 5, [1, 2, 3], [["a"]] * 3, ["a"], {"a": 1})},
    **{f"num_classes {value!r}": {"num_classes": value} for value in (10**6, -1, True, "3", 2.5, 1 << 62, [3])},
    **{f"img_size {value!r}": {"img_size": value} for value in (10**9, 0, -5, [32], [32, 10**9], "32", [[32, 32]])},
    **{f"mean {value!r}": {"mean": value} for value in ([1, 2], "abc", [1, 2, "3"], [[1, 2, 3]], 5, [1e999] * 3)},
    **{f"std {value!r}": {"std": value} for value in ([0, 1, 1], [-1, 1, 1], [1, 2, 3, 4], {"a": 1})},
    **{
        f"evaluation {value!r}"[:60]: {"evaluation": value}
        for value in ([], "center", {"crop": 10**9}, {"resize": 36}, {**CROP, "resize": -3}, {**CROP, "more": 1})
    },
    **{
        f"evaluation {key} {value!r}": {"evaluation": {**CROP, key: value}}
        for key, value in (("interpolation", ["a"]), ("mode", 7), ("fill", 5), ("fill", [1]))
    },
    **{f"model {value!r}"[:40]: {"model": value} for value in (["a"], 5, "a" * 50_000, "a\x1b[2J\nb")},
    **{f"data {value!r}": {"data": value} for value in ([1], "x")},
    "lists in lists": {"more": json.loads("[" * 900 + "]" * 900)},
}
HARMLESS_FACTS = {
    **{f"metadata are {value!r}": value for value in ([], "x", 3, None)},  # of another program
    **{f"weights {value!r}": {"weights": value} for value in ("both", 5, ["raw"], None)},
    **{
        f"{key} {value!r}": {key: value}
        for key in ("layout", "holds", "notes")
        for value in (5, None, ["a"], {"b": [1]})
    },
}
# Safetensors files: header, data.
GOOD = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def stated(**changed):
    return safetensors({"a": {**GOOD["a"], **changed}}, bytes(8))


HEADERS = {
    **{f"__metadata__ {v!r}"[:40]: safetensors({"__metadata__": v, **GOOD}, bytes(8)) for v in ([], 5, "a", {"a": 1})},
    **{f"__metadata__ {v!r}": safetensors({"__metadata__": {"retoken": v}, **GOOD}, bytes(8)) for v in ([], {}, None)},
    "metadata deep": safetensors({"__metadata__": {"retoken": "[" * 45_000}, **GOOD}, bytes(8)),
    "metadata deep and whole": safetensors({"__metadata__": {"retoken": "[" * 40_000 + "]" * 40_000}}),
    "metadata no JSON": safetensors({"__metadata__": {"retoken": "{'a'"}, **GOOD}, bytes(8)),
    "metadata with a long number": safetensors({"__metadata__": {"retoken": "1" * 9000}, **GOOD}, bytes(8)),
    "header deep": safetensors(b'{"a":' * 9000 + b"1" + b"}" * 9000),
    "header of lists": safetensors(b"{" + b"[" * 50_000),
    "header no UTF-8": safetensors(b'{"\xff\xfe": 1}'),
    "header a list": safetensors(b"[]"),
    "header empty": safetensors(b"{}"),
    **{f"header of {n} bytes": safetensors(GOOD, bytes(8), n) for n in (0, 1, 8, 10**8, 1 << 31, (1 << 63) + 1)},
    **{f"type {v!r}": stated(dtype=v) for v in ("X9", "", None, 5, "F4", "F8_E8M0", "f32", "O")},
    **{f"shape {v!r}": stated(shape=v) for v in ([-2], [1 << 62, 4], [1 << 63], [2.5], "2", None, [[2]], [3])},
    "shape of a thousand": stated(shape=[2] + [1] * 1000),
    "shape without values": stated(shape=[0, 1 << 60], data_offsets=[0, 0]),
    **{f"offsets {v}": stated(data_offsets=v) for v in ([8, 0], [0, 1 << 62], [-8, 0], [4, 12], [0], [0, 4], "08")},
    "overlap": safetensors({**GOOD, "b": GOOD["a"]}, bytes(8)),
    "rest": safetensors(GOOD, bytes(80)),
    "not finite": safetensors(GOOD, b"\xff" * 8),
}
