"""engine.malloc: reuse of freed memory."""

import platform
import subprocess
import sys

import pytest

from engine import malloc

PROGRAM = """
import resource, sys, torch
from engine.malloc import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def work():
    for _ in range(4):
        a = torch.ones(2**24)  # 64 MiB
        b = a + a
        del a, b
for _ in range(3):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def is_recent(name, version):
    return name == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 35)


@pytest.mark.skipif(not is_recent(*platform.libc_ver()), reason="the C library is not glibc 2.35 or later")
def test_freed_memory_is_used_again_without_page_faults():
    faults = {}
    for mode in ("keep", "leave"):
        done = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True)
        faults[mode] = int(done.stdout)
    assert 5 * faults["keep"] < faults["leave"]  # where pages are huge, both are few


@pytest.mark.parametrize(("largest", "kept"), [(2**30, True), (2**25, True), (0, False)])
def test_limits_are_those_that_the_c_library_accepts(largest, kept, monkeypatch):
    """glibc before 2.35 refuses blocks above 32 MiB; setting the trim threshold ends their automatic growth."""
    asked = []

    class Library:
        @staticmethod
        def mallopt(parameter, limit):
            asked.append(parameter)
            return int(parameter == malloc.M_TRIM_THRESHOLD or limit <= largest)

    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda name: Library)
    monkeypatch.setattr(malloc.platform, "libc_ver", lambda: ("glibc", "2.28"))
    assert malloc.keep_freed_memory() == kept
    blocks = [malloc.M_MMAP_THRESHOLD] * (1 if largest > 2**25 else 2)
    assert asked == [*blocks, *[malloc.M_TRIM_THRESHOLD] * kept]
