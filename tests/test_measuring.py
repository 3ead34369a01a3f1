"""The clockwork of the bench: what is counted is what runs, what binds is what takes longest."""

import time

import pytest
import torch

from moemla import measuring
from moemla.measuring import (
    Limits,
    LiveBytes,
    Row,
    Work,
    copy_rate,
    interleaved,
    limits,
    matmul_rate,
    measure,
    operations,
    traffic,
)


def test_rounds_are_interleaved_and_each_program_has_its_time():
    order = []

    def program(name, seconds):
        def run():
            order.append(name)
            time.sleep(seconds)

        return run

    times = interleaved({"quick": program("q", 0.004), "slow": program("s", 0.012)}, "cpu", seconds=0.01, rounds=3)
    assert order[4:10] == ["q", "s"] * 3  # after two calls of each
    assert len(times["quick"]) == len(times["slow"]) >= 3
    assert all(0.004 <= t < 0.012 for t in times["quick"])
    assert all(t >= 0.012 for t in times["slow"])


def test_short_programs_are_repeated_in_a_sample():
    calls = []
    times = interleaved({"short": lambda: calls.append(1)}, "cpu", seconds=0.0, rounds=4)["short"]
    assert len(times) == 4
    assert len(calls) > 1000
    assert max(times) < 1e-4


def test_operations_are_counted_and_views_are_not():
    x = torch.ones(4, 6)
    assert operations(lambda: x + 1) == 1
    assert operations(lambda: x.view(24).T.unsqueeze(0)[0]) == 0
    assert operations(lambda: ((x + 1).view(6, 4) * 2).sum()) == 3


def test_traffic_counts_each_number_once_and_views_move_nothing():
    x, y = torch.ones(2, 3, 4), torch.ones(4, 5)
    assert traffic(lambda: x @ y) == (1, 4 * (24 + 20 + 30))  # the product is that of a matrix; what follows is a view
    one = torch.ones(()).expand(10)
    assert traffic(lambda: one + torch.arange(10.0)) == (2, 4 * 10 + 4 * (1 + 10 + 10))
    assert traffic(lambda: torch.empty(10)) == (1, 0)
    assert traffic(lambda: x.new_zeros(10)) == (1, 40)


def test_bytes_count_while_somebody_holds_them():
    outside = torch.ones(100)
    with LiveBytes() as live:
        a = torch.ones(1000)
        view = a[:10].view(2, 5)
        assert live.now == live.peak == 4000
        b = a + a
        a.add_(1)
        outside.mul_(2)  # was there before
        assert live.now == 8000
        del a
        assert live.now == 8000  # the view holds it
        del view, b
        assert (live.now, live.peak) == (0, 8000)
        live.restart()
        torch.ones(5, dtype=torch.float64)
    assert (live.now, live.peak) == (0, 40)


def test_bytes_of_a_graph_live_until_its_backward():
    x = torch.ones(50, requires_grad=True)
    with LiveBytes() as live:
        y = x.exp().exp().sum()  # each keeps its result
        assert live.now == 2 * 200 + 4
        y.backward()
        assert live.now == 200 + 4  # the gradient, and y


def test_bytes_are_those_of_the_allocator():
    """The profiler sees every allocation of a CPU; in a step of training the mode misses none that decides the peak."""
    weight = torch.randn(64, 64, requires_grad=True)

    def program():
        x = torch.randn(256, 64)
        torch.nn.functional.gelu(x @ weight).softmax(-1).square().sum().backward()

    with LiveBytes() as live:
        program()
    weight.grad = None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        program()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert peak == pytest.approx(live.peak, rel=0.01)


def test_the_longest_of_three_times_binds(monkeypatch):
    monkeypatch.setattr(measuring, "copy_rate", lambda device, moved: 100.0)
    found = Limits("cpu", "float32", products=1000.0, operation=0.5)
    assert found.bind(flops=9000, moved=100, operations=2) == (9.0, "products")
    assert found.bind(flops=90, moved=800, operations=2) == (8.0, "bytes")
    assert found.bind(flops=90, moved=100, operations=20) == (10.0, "operations")


def test_rates_of_this_machine_are_plausible():
    found = limits("cpu", torch.float32)
    assert 1e8 < found.products < 1e14
    assert 1e-8 < found.operation < 1e-2
    assert 1e7 < copy_rate("cpu", 1e6) < 1e13
    assert copy_rate("cpu", 1.1e6) == copy_rate("cpu", 1.2e6)  # one measurement for a power of two
    assert 1e7 < matmul_rate("cpu", torch.float32, size=64) < 1e14


def test_rows_carry_their_own_work():
    found = Limits("cpu", "float32", products=1e9, operation=1e-9)
    programs = {"a": lambda: time.sleep(0.001), "b": lambda: time.sleep(0.003)}
    work = {"a": Work(1e6, 0), "b": Work(5e6, 0)}
    a, b = measure("naps", programs, work, tokens=6, machine=found, seconds=0.02)
    assert (a.program, b.program, a.case) == ("a", "b", "naps")
    assert a.seconds < b.seconds
    assert (a.limit, b.limit) == (pytest.approx(1e-3), pytest.approx(5e-3))
    assert a.binds == b.binds == "products"
    assert a.tokens_per_second == pytest.approx(6 / a.seconds)
    assert isinstance(a, Row) and a.spread >= 0 and a.rounds >= 5


def test_measuring_the_machine_leaves_the_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    assert matmul_rate(size=64) > 1e6
    assert torch.equal(torch.rand(4), expected)


def test_a_replay_is_timed_in_the_programs_place_and_starts_nothing():
    x, machine = torch.ones(4), Limits("cpu", "float32", products=1e12, operation=1.0)
    calls = []
    programs = {name: lambda name=name: calls.append(name) or (x + 1) * 2 for name in ("as it is", "replayed")}
    replay = dict(programs, replayed=lambda: time.sleep(0.004))
    plain, other = measure("case", programs, Work(0, 1), 1, machine, 0.0, replay)
    assert plain.limit == 2.0 and other.limit < 1e-6 and other.binds == "bytes"
    assert calls.count("replayed") == 0 and other.seconds >= 0.004
