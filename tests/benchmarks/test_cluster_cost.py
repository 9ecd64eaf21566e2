"""The arithmetic of benchmarks/cluster_cost.py, against plain simulations and numbers computed by hand."""

from dataclasses import replace

import pytest

from benchmarks.cluster_cost import Assumptions, all_reduce_seconds, buckets, cost, exposed_seconds, main

SIMPLE = Assumptions(
    parameters_m=100, gmacs=10, micro_batch=100, tflops=60, half_batch=0, gpu_gbyte_s=100, node_gbyte_s=10,
    gpu_latency_us=0, node_latency_us=0, bucket_mb=100, first_bucket_mb=100, statistics_k=0, host_latency_us=0,
)  # fmt: skip


def test_buckets_hold_all_gradients_once():
    a = Assumptions(parameters_m=95, gradient_bytes=4, first_bucket_mb=1, bucket_mb=25)
    assert buckets(a) == [1e6] + [25e6] * 15 + [4e6]
    assert sum(buckets(a)) == 95e6 * 4
    assert buckets(replace(a, parameters_m=0.1)) == [0.4e6]


def ring_by_steps(values):
    """Sum the processes' pieces by a ring, a message at a time; return the sums and the pieces each process sent."""
    n, held, sent = len(values), [list(v) for v in values], [0] * len(values)
    for gather in (False, True):
        for step in range(n - 1):
            messages = [(r, (r - step + gather) % n) for r in range(n)]
            pieces = [held[r][piece] for r, piece in messages]
            for (r, piece), value in zip(messages, pieces, strict=True):
                held[(r + 1) % n][piece] = value if gather else held[(r + 1) % n][piece] + value
                sent[r] += 1
    return held, sent


@pytest.mark.parametrize("n", [2, 3, 8])
def test_ring_sends_as_much_as_a_simulated_one(n):
    values = [[10**r * (piece + 1) for piece in range(n)] for r in range(n)]
    held, sent = ring_by_steps(values)
    assert all(row == [sum(column) for column in zip(*values, strict=True)] for row in held)
    size = 1e9
    expected = sent[0] * size / n / 100e9
    assert all_reduce_seconds(SIMPLE, size, n) == pytest.approx(expected)


def test_all_reduce_is_limited_by_the_link_between_nodes_and_by_latency():
    assert all_reduce_seconds(SIMPLE, 1e9, 1) == 0
    assert all_reduce_seconds(SIMPLE, 1e9, 16) == pytest.approx(2 * 15 / 16 * 1e9 / 10e9)
    slow = replace(SIMPLE, gpu_latency_us=1, node_latency_us=10)
    assert all_reduce_seconds(slow, 0.0, 8) == pytest.approx(14e-6)
    assert all_reduce_seconds(slow, 0.0, 512) == pytest.approx(14e-6 + 12 * 10e-6)  # the tree: 64 nodes are 6 levels


@pytest.mark.parametrize(
    ("times", "expected"),
    [((0, 0, 0, 0), 0), ((1, 1, 1, 1), 1), ((2, 2, 2, 2), 5), ((0, 0, 0, 3), 3), ((3, 0, 0, 0), 0), ((9, 1, 1, 1), 9)],
)
def test_only_what_outlasts_the_backward_pass_is_exposed(times, expected):
    # Four equal buckets, filled at 1, 2, 3 and 4 seconds.
    assert exposed_seconds(4.0, [1, 1, 1, 1], times) == pytest.approx(expected)


def test_cost_of_an_update_is_that_computed_by_hand():
    alone = cost(SIMPLE, 1)
    assert alone.compute == pytest.approx(3 * 2 * 10e9 * 100 / 60e12)  # 0.1 s
    assert alone.seconds == alone.compute
    many = cost(SIMPLE, 16)  # 400 MB in four buckets of 18.75 ms each, filled every 16.7 ms
    assert many.reduce == pytest.approx(4 * 0.01875)
    assert many.exposed == pytest.approx(0.1 * 2 / 3 / 4 + 4 * 0.01875 - 0.1 * 2 / 3)
    assert many.images == 1600


def test_statistics_are_waited_for_and_the_consensus_only_if_it_lasts_longer_than_an_update():
    plain, more = (cost(replace(SIMPLE, statistics_k=s, host_latency_us=10), 16) for s in (0, 1000))
    assert more.statistics == pytest.approx(2 * 15 / 16 * 4e6 / 10e9)
    assert more.exposed - plain.exposed == pytest.approx(more.statistics)
    assert plain.consensus == pytest.approx(8 * 10e-6)
    assert plain.exposed == cost(SIMPLE, 16).exposed
    assert cost(replace(SIMPLE, host_latency_us=1e6), 16).seconds == pytest.approx(8.0)
    assert cost(replace(SIMPLE, host_latency_us=1e6), 1).consensus == 0


def test_fixed_global_batch_is_divided_and_accumulated():
    fixed = replace(SIMPLE, global_batch=1024, micro_batch=128)
    assert [(c.micro_batch, c.accumulation) for c in (cost(fixed, n) for n in (1, 4, 8, 512))] == [
        (128, 8), (128, 2), (128, 1), (2, 1)
    ]  # fmt: skip
    assert {cost(fixed, n).images for n in (1, 4, 8, 512)} == {1024}
    with pytest.raises(ValueError, match="does not divide among 3 GPUs"):
        cost(fixed, 3)


def test_command_prints_a_row_for_each_number_of_gpus(capsys):
    assert main(["--gpus", "1", "8", "512"]) == 0
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[2:5]] == ["1", "8", "512"]
    assert "380 MB an update" in printed
    assert "BatchNorm statistics: 144 KB an update" in printed
    assert "consensus on stopping: 8 bytes an update" in printed
    with pytest.raises(SystemExit):
        main(["--tflops", "0"])
    assert "--tflops 0.0: give a positive number" in capsys.readouterr().err
