"""engine.heap: memory that is freed is used again."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from engine.heap import keep_freed_memory
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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_used_again_without_page_faults():
    faults = {}
    for mode in ("keep", "leave"):
        done = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True)
        faults[mode] = int(done.stdout)
    assert faults["keep"] < 100 < 1000 < faults["leave"]
