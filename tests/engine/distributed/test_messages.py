"""Messages between processes: JSON of bounded length, nothing unpickled, errors of the main process raised on all."""

import ast
import pickle

import pytest
import torch

from engine.distributed.messages import decode, encode
from engine.distributed.processes import init_processes
from tests.conftest import ROOT
from tests.engine.distributed.test_processes import free_port, launch

VALUES = [None, "", "caf\udce9.jpg", "猫\x1b", 0, -1.5, True, [], [1, ["a", None]], {"a": {"b": [1.5]}}]
SENT = """
import sys
from engine.distributed import messages
from engine.distributed.processes import init_processes, shut_down
p = init_processes("cpu", 60)
values = {values!r}
print(all(p.from_main(value if p.main else "ignored") == value for value in values))
own = [[i, "x" * (p.rank * 1000)] for i in range(p.rank * 3)]
print([len(str(value)) for value in p.from_all(own)])
class Kept(ValueError):
    pass
class Other(ValueError):
    pass
def fail(error):
    raise error
def report(call):
    try:
        print(call())
    except ValueError as error:
        print(type(error).__name__, error)
for error in (Kept("a"), Other("b")):
    report(lambda: p.on_main(lambda: fail(error), (Kept,)))
report(lambda: p.on_main(lambda: p.rank))
messages.MAX_BYTES = 100
report(lambda: p.from_main("x" * 99 if p.main else None))
report(lambda: p.from_all("x" * 99 * p.rank))
report(lambda: p.from_all(p.rank))
shut_down()
"""


def test_two_processes_exchange_json_and_errors_and_refuse_long_messages():
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [shared | {"RANK": i, "LOCAL_RANK": i} for i in ("0", "1")]
    first, second = launch(SENT.format(values=VALUES), ranks)
    too_long = "ValueError a message between processes has 101 bytes; at most 100 are exchanged"
    expected = ["True", "[2, 3027]", "Kept a", "{} b", "0", too_long, too_long, "[0, 1]", ""]
    assert first[:2] == (0, "\n".join(expected).format("Other")), first
    assert second[:2] == (0, "\n".join(expected).format("ValueError")), second


def test_one_process_gets_the_types_that_several_get(monkeypatch):
    for key in ("RANK", "WORLD_SIZE", "SLURM_STEP_ID"):
        monkeypatch.delenv(key, raising=False)
    processes = init_processes("cpu")
    assert processes.from_main((1, 2)) == [1, 2]
    assert processes.from_all({"a": (1,)}) == [{"a": [1]}]
    assert processes.on_main(lambda: ("x",)) == ["x"]
    with pytest.raises(TypeError):
        processes.on_main(lambda: ROOT)


def test_pickle_is_not_read_as_a_message():
    with pytest.raises(ValueError, match=r"."):
        decode(torch.frombuffer(bytearray(pickle.dumps([1])), dtype=torch.uint8))
    with pytest.raises(TypeError):
        encode(object())


OBJECTS = {"broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list"}
OBJECTS |= {"send_object_list", "recv_object_list", "pickle", "dill", "cloudpickle", "marshal", "shelve"}


def test_no_collective_pickles_its_values():
    files = [ROOT / "train.py", ROOT / "eval.py"]
    files += [
        path
        for package in ("common", "engine", "trainer", "data", "models", "tools")
        for path in (ROOT / package).rglob("*.py")
    ]
    found = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.attr] if isinstance(node, ast.Attribute) else []
            found += [(path.name, name) for name in names if name in OBJECTS]
    assert found == [("unpickling.py", "pickle")]  # the restricted reader of weights files
