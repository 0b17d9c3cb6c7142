"""Sessions with a clock and kernels that do not exist, journals that were cut off, and a glance at real kernels.

Nothing here asserts how long anything takes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servecast.calibration.microbenchmarks import journal as journals
from servecast.calibration.microbenchmarks.journal import Header, Journal, Point, Sample, parse_sample, read_journal
from servecast.calibration.microbenchmarks.kernel import at, points
from servecast.calibration.microbenchmarks.session import MOST_ADDED, Outcome, Session
from servecast.calibration.microbenchmarks.suite import Settings, parse_budget, parse_groups, parse_memory
from servecast.calibration.microbenchmarks.timing import (
    REPEATS,
    ClockWatch,
    HostTimer,
    Measurement,
    marked,
    outliers,
    repeat,
)

HEADER = Header(settings={"device": "A machine", "threads": 1, "seed": 1}, environment={"torch": "2.13.0"})


class FakeClock:
    """Stands still until it is moved; `behind_s` is how far the time of day lags."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.behind_s = 0.0

    def perf(self) -> float:
        return self.now_s

    def wall(self) -> float:
        return 1e9 + self.now_s - self.behind_s

    def wait(self, seconds: float) -> None:
        self.now_s += seconds


class FakeKernel:
    """Takes `cost_s` a visit; `before` runs first, and may raise."""

    dtypes = ("u8",)

    def __init__(
        self,
        clock: FakeClock,
        name: str = "memory_copy",
        *,
        cost_s: float = 0.1,
        sizes: Sequence[int] = (1024, 2048, 4096, 8192),
        before: Callable[[], None] | None = None,
    ) -> None:
        self.name, self._clock, self.cost_s, self.sizes, self._before = name, clock, cost_s, sizes, before
        self.closed = 0

    def grid(self) -> list[Point]:
        return points(bytes=self.sizes)

    def candidates(self) -> list[Point]:
        return points(bytes=[1 << power for power in range(9, 24)])

    def guess_s(self, point: Point, dtype: str) -> float:  # noqa: ARG002 (one format)
        return 1e-6 * dict(point)["bytes"] / 1024

    def measure(self, point: Point, dtype: str, limit_s: float) -> Measurement:  # noqa: ARG002 (likewise)
        if self._before is not None:
            self._before()
        self._clock.wait(self.cost_s)
        one = 1e-6 + dict(point)["bytes"] * 1e-10
        return Measurement(seconds=(one, 1.02 * one, 0.98 * one), inner=3)

    def close(self) -> None:
        self.closed += 1


def session(path: Path, clock: FakeClock, kernels: Sequence[FakeKernel], **options: object) -> Outcome:
    with Journal(path, HEADER) as journal:
        given_options = {"budget_s": 10.0, "seed": 1, **options}
        return Session(kernels, journal, clock, **given_options).run()  # type: ignore[arg-type]


# ---- the session -------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget_s", [3.0, 10.0, 60.0])
def test_the_budget_holds(tmp_path: Path, budget_s: float) -> None:
    """Hand: visits of 0.1 s fill the budget to within one visit, and never beyond it."""
    clock = FakeClock()
    outcome = session(tmp_path / "a.jsonl", clock, [FakeKernel(clock)], budget_s=budget_s)
    spent_s = clock.now_s - 100.0
    assert budget_s - 0.12 <= spent_s <= budget_s
    assert outcome.elapsed_s == pytest.approx(spent_s, rel=1e-9)
    assert outcome.samples == round(spent_s / 0.1)


def test_set_up_is_part_of_the_budget(tmp_path: Path) -> None:
    clock = FakeClock()
    clock.wait(4.0)
    session(tmp_path / "a.jsonl", clock, [FakeKernel(clock)], begun_s=100.0)
    assert 109.8 <= clock.now_s <= 110.0


def test_rounds_are_interleaved_and_shuffled(tmp_path: Path) -> None:
    """Every point of every kernel once a round, the order another each time, the same for the same seed."""
    clock = FakeClock()
    kernels = [FakeKernel(clock, "memory_copy"), FakeKernel(clock, "memory_read")]
    session(tmp_path / "a.jsonl", clock, kernels)
    session(tmp_path / "b.jsonl", clock, kernels)
    assert [one.point for one in read_journal(tmp_path / "b.jsonl")[1]] == [
        one.point for one in read_journal(tmp_path / "a.jsonl")[1]
    ]
    _, samples = read_journal(tmp_path / "a.jsonl")
    rounds = [[(one.kernel, one.point) for one in samples if one.round == number] for number in range(12)]
    assert all(len(one) == 8 and len(set(one)) == 8 for one in rounds)
    assert len({tuple(one) for one in rounds}) > 6
    assert any(a[0] != b[0] for a, b in zip(rounds[0], rounds[0][1:], strict=False))


def test_what_does_not_fit_is_left_out_and_said(tmp_path: Path) -> None:
    """Hand: a call of 1 s (guessed) does not fit a share of the budget; the rest is measured."""
    clock = FakeClock()
    outcome = session(tmp_path / "a.jsonl", clock, [FakeKernel(clock, sizes=(1024, 2048, 4096, 1 << 30))])
    assert outcome.left_out == 1
    assert {one.point for one in read_journal(tmp_path / "a.jsonl")[1]} == {at(bytes=n) for n in (1024, 2048, 4096)}


def test_points_are_added_where_asked(tmp_path: Path) -> None:
    """From the third round one candidate a round, at most `MOST_ADDED`, each then visited in every round."""
    clock = FakeClock()
    asked: list[int] = []

    def choose(samples: Sequence[Sample], kernel: str, dtype: str, candidates: Sequence[Point]) -> Point:
        asked.append(len(samples))
        assert at(bytes=1024) not in candidates
        return candidates[-1]

    session(tmp_path / "a.jsonl", clock, [FakeKernel(clock)], budget_s=30.0, choose=choose)
    _, samples = read_journal(tmp_path / "a.jsonl")
    assert asked[0] == 8  # two rounds of four
    assert len({one.point for one in samples}) == 4 + MOST_ADDED
    visits = Counter(one.point for one in samples)
    assert min(visits.values()) > 5


def test_an_interrupt_keeps_all_and_a_second_run_goes_on(tmp_path: Path) -> None:
    """Ctrl-C in the 8th visit: seven samples stay; the same journal then gets the missing ones and no point twice."""
    path, clock = tmp_path / "a.jsonl", FakeClock()
    left = iter(range(7))

    def before() -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    kernel = FakeKernel(clock, before=before)
    outcome = session(path, clock, [kernel], budget_s=2.0)
    assert outcome.interrupted
    assert outcome.samples == 7
    assert kernel.closed == 1
    assert len(read_journal(path)[1]) == 7
    clock.wait(3600.0)
    again = session(path, clock, [FakeKernel(clock)], budget_s=2.0)
    assert not again.interrupted
    _, samples = read_journal(path)
    assert len(samples) == 7 + again.samples
    assert len({(one.round, one.point) for one in samples}) == len(samples)
    assert [one.session for one in samples] == [0] * 7 + [1] * again.samples
    # the budget is that of the journal: what the first session used is used
    assert 1.8 <= again.elapsed_s <= 2.0


def test_a_journal_whose_budget_is_used_gets_nothing(tmp_path: Path) -> None:
    path, clock = tmp_path / "a.jsonl", FakeClock()
    session(path, clock, [FakeKernel(clock)], budget_s=2.0)
    assert session(path, clock, [FakeKernel(clock)], budget_s=2.0).samples == 0
    assert session(path, clock, [FakeKernel(clock)], budget_s=3.0).samples > 5


def test_a_clock_that_jumps_marks_the_sample(tmp_path: Path) -> None:
    """The time of day is set back by an hour during the 5th visit: that sample is suspect, the others are not."""
    clock = FakeClock()
    turn = iter(range(100))

    def before() -> None:
        if next(turn) == 4:
            clock.behind_s += 3600.0

    outcome = session(tmp_path / "a.jsonl", clock, [FakeKernel(clock, before=before)], budget_s=2.0)
    _, samples = read_journal(tmp_path / "a.jsonl")
    assert [i for i, one in enumerate(samples) if one.suspect] == [4]
    assert outcome.suspects == (samples[4].suspect,)
    assert samples[4].suspect.startswith("the clock jumped: 0.1 s by the counter")


def test_progress_and_fresh_data(tmp_path: Path) -> None:
    clock = FakeClock()
    seen: list[tuple[int, int]] = []
    seeds: list[int] = []
    session(
        tmp_path / "a.jsonl",
        clock,
        [FakeKernel(clock)],
        progress=lambda done, total: seen.append((done, total)),
        refresh=seeds.append,
    )
    assert seen[0][0] <= seen[-1][0] <= seen[-1][1] == 10
    assert len(set(seeds)) == len(seeds) > 10


# ---- timing ------------------------------------------------------------------------------------------


def test_repeats_of_a_fake_call() -> None:
    """Hand: calls of 50 us are taken four at a time; eleven repeats; each set of buffers in its turn."""
    clock = FakeClock()
    turns: list[int] = []

    def call(turn: int) -> None:
        turns.append(turn)
        clock.wait(5e-5)

    found = repeat(call, HostTimer(clock), clock, 1.0, switches=lambda: 0)
    assert found.seconds == pytest.approx([5e-5] * REPEATS, rel=1e-6)
    assert found.inner == 4
    assert turns == [0, 1, *range(2, 2 + 4 * REPEATS)]
    assert found.disturbed == ()


def test_a_limit_leaves_two_repeats() -> None:
    clock = FakeClock()
    found = repeat(lambda _: clock.wait(1.0), HostTimer(clock), clock, 0.5, switches=lambda: 0)
    assert len(found.seconds) == 2


def test_disturbed_repeats_are_marked_and_made_up_for() -> None:
    """The system takes the core during every other repeat: twice the repeats, half of them marked."""
    clock = FakeClock()
    count = iter(range(1000))
    found = repeat(lambda _: clock.wait(1e-3), HostTimer(clock), clock, 1.0, switches=lambda: next(count) // 2)
    assert len(found.seconds) - len(found.disturbed) == REPEATS
    assert set(found.disturbed) == set(range(1, len(found.seconds), 2))
    assert set(marked(found)) >= set(found.disturbed)


def test_outliers_are_marked() -> None:
    """Hand: a value of three times the median among values within 1 %; none where all spread alike."""
    assert outliers([1.0, 1.01, 0.99, 3.0, 1.0]) == (3,)
    assert outliers([1.0, 2.0, 3.0, 4.0]) == ()
    assert marked(Measurement(seconds=(1.0, 1.0, 9.0, 1.0, 5.0), inner=1, disturbed=(2,))) == (2, 4)


def test_medians_leave_marked_repeats_out() -> None:
    base = {"kernel": "gemm", "dtype": "bf16", "point": at(m=1), "round": 0, "session": 0, "elapsed_s": 0.0, "inner": 1}
    one = Sample(**base, seconds=(1.0, 2.0, 9.0), outliers=(2,))  # type: ignore[arg-type]
    every = Sample(**base, seconds=(1.0, 2.0, 9.0), outliers=(0, 1, 2))  # type: ignore[arg-type]
    assert (one.median_s, one.clean) == (1.5, True)
    assert (every.median_s, every.clean) == (2.0, False)


def test_the_watch_forgives_slewing() -> None:
    clock = FakeClock()
    watch = ClockWatch(clock)
    clock.wait(100.0)
    clock.behind_s += 0.05  # 500 ppm
    assert watch.jump() == ""
    clock.behind_s += 1.0
    assert "jumped" in watch.jump()
    assert watch.jump() == ""


# ---- the journal -------------------------------------------------------------------------------------


def written(tmp_path: Path) -> Path:
    path, clock = tmp_path / "a.jsonl", FakeClock()
    session(path, clock, [FakeKernel(clock)], budget_s=1.0)
    return path


def test_a_half_written_line_is_dropped_and_written_over(tmp_path: Path) -> None:
    path = written(tmp_path)
    whole = path.read_bytes()
    before = read_journal(path)[1]
    path.write_bytes(whole + b'{"kernel": "memory_copy", "dty')
    assert read_journal(path)[1] == before
    with Journal(path, HEADER) as journal:
        journal.append(before[0])
    assert read_journal(path)[1] == [*before, before[0]]


def test_a_corrupt_line_is_named(tmp_path: Path) -> None:
    path = written(tmp_path)
    lines = path.read_text().splitlines()
    lines[3] = lines[3].replace('"inner": 3', '"inner": -3')
    path.write_text("\n".join(lines) + "\n")
    kept = path.read_bytes()
    with pytest.raises(ValueError, match=r"a.jsonl: line 4: inner must be a whole number from 1 to .*, got -3"):
        Journal(path, HEADER)
    assert path.read_bytes() == kept


def test_another_device_or_setting_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path)
    other = Header(settings={**HEADER.settings, "threads": 2})
    with pytest.raises(ValueError, match=r"threads must be that of its samples \(1\), got 2; use another file"):
        Journal(path, other)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", None),
        (b"half", "must begin with a whole line"),
        (b"[]\n", "line 1: must be a JSON object, got list"),
        (b'{"schema": "other/1"}\n', "line 1: schema must be servecast.samples/1, got 'other/1'"),
        (b"\xff\xfe\n", "line 1: must be UTF-8"),
        (b"[" * 9000 + b"\n", "line 1: must be"),
    ],
)
def test_what_is_no_journal(tmp_path: Path, content: bytes, message: str | None) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    if message is None:  # an empty file is a new one
        with Journal(path, HEADER) as journal:
            assert journal.samples == []
        return
    with pytest.raises(ValueError, match=message):
        Journal(path, HEADER)
    assert path.read_bytes() == content


def test_a_gzip_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(b"\x1f\x8b\x08nothing")
    with pytest.raises(ValueError, match="must be a whole gzip file"):
        read_journal(path)
    with pytest.raises(ValueError, match="must be a plain file"):
        Journal(path, HEADER)


def test_size_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path)
    monkeypatch.setattr(journals, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="samples must be at most"):
        read_journal(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
LINE = {
    "kernel": "gemm",
    "dtype": "bf16",
    "point": {"m": 1, "n": 2, "k": 3},
    "round": 0,
    "session": 0,
    "elapsed_s": 1.5,
    "seconds": [1e-5, 2e-5],
    "inner": 4,
    "outliers": [1],
    "suspect": "",
}


@given(field=st.sampled_from(sorted(LINE)), value=JSON)
@settings(max_examples=150)
def test_fuzzed_lines_are_read_or_refused(field: str, value: object) -> None:
    """A line is a sample that reads back as itself, or a ValueError of one line."""
    message = ""
    try:
        sample = parse_sample(json.dumps({**LINE, field: value}))
    except ValueError as error:
        message = str(error)
    else:
        assert parse_sample(journals.sample_line(sample)).point == sample.point
    assert "\n" not in message
    assert len(message) < 300


@given(text=st.text(max_size=60))
@settings(max_examples=100)
def test_fuzzed_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be|is missing|not a known field"):
        parse_sample(text)


# ---- settings ----------------------------------------------------------------------------------------


def test_quantities() -> None:
    assert (parse_budget("60s"), parse_budget("3min"), parse_budget("0.5h")) == (60.0, 180.0, 1800.0)
    assert parse_memory("2GiB") == 2**31
    assert parse_groups("gemm, disk") == ("gemm", "disk")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: parse_budget("60"), "budget must be a number with s, min or h, such as 60s, got '60'"),
        (lambda: parse_budget("0s"), "budget must be from 1 to 86400 s, got 0"),
        (lambda: parse_memory("2GB"), "memory must be a number with MiB or GiB, such as 2GiB, got '2GB'"),
        (lambda: parse_memory("1MiB"), "memory must be from"),
        (lambda: Settings(device="tpu"), "device must be cpu or cuda, got 'tpu'"),
        (lambda: Settings(groups=("gem",)), "only must be among gemm, .*, got 'gem'"),
        (lambda: Settings(groups=("gemm", "gemm")), "only must name groups, each once"),
        (lambda: Settings(threads=0), "threads must be from 1 to 4096, got 0"),
        (lambda: Settings(seed=-1), "seed must be from 0"),
    ],
)
def test_refused_settings(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ---- real kernels ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["gemm", "attention", "layer", "overhead", "memory", "copies"])
def test_every_kernel_runs(name: str) -> None:
    """Its smallest point, once, in both formats: times are positive, and nothing is said of how long they are."""
    pytest.importorskip("torch", reason="needs torch: pip install 'servecast[calibrate]'")
    from servecast.calibration.microbenchmarks.device import Device
    from servecast.calibration.microbenchmarks.suite import kernels_of
    from servecast.calibration.microbenchmarks.timing import SystemClock

    device = Device("cpu", SystemClock(), threads=1, memory_bytes=192 << 20)
    for kernel in kernels_of(device, (name,), 1):
        for dtype in kernel.dtypes:
            point = min(kernel.grid(), key=lambda one: kernel.guess_s(one, dtype))
            found = kernel.measure(point, dtype, 1e-3)
            assert len(found.seconds) >= 2
            assert min(found.seconds) > 0.0
        kernel.close()


def test_disk_reads(tmp_path: Path) -> None:
    """A small file: whole reads at random places, by one and by two threads; the file has no name while it is read."""
    from servecast.calibration.microbenchmarks.disk import DiskFile, DiskRead

    file = DiskFile(1, folder=str(tmp_path), nbytes=1 << 20)
    assert list(tmp_path.iterdir()) == []
    assert file.method in ("direct", "advice", "cached")
    for readers in (1, 2):
        kernel = DiskRead(file, readers, FakeClock())
        found = kernel.measure(at(bytes=readers << 13), "u8", 0.0)
        assert len(found.seconds) >= 3
        assert kernel.guess_s(at(bytes=1 << 20), "u8") == float("inf")
    file.close()
    file.close()


def test_collectives_between_two_processes() -> None:
    """All-reduce and send-receive over the loopback, the smallest message once."""
    pytest.importorskip("torch", reason="needs torch: pip install 'servecast[calibrate]'")
    from servecast.calibration.microbenchmarks.collectives import Collective, Group

    group = Group("gloo", 2, 1)
    try:
        for name in ("all_reduce", "send_recv"):
            found = Collective(name, group).measure(at(bytes=256, ranks=2), "u8", 1e-3)
            assert len(found.seconds) >= 2
            assert min(found.seconds) > 0.0
    finally:
        group.close()


def test_without_torch_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from servecast.calibration.microbenchmarks import device

    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(device, "import_module", absent)
    with pytest.raises(ValueError, match=r"calibrate needs torch: pip install 'servecast\[calibrate\]'"):
        device.load_torch()


def test_the_package_needs_nothing_but_numpy_and_scipy() -> None:
    """On a bare machine: no pydantic, no click, and torch only when a device is opened."""
    import subprocess
    import sys

    code = (
        "import sys; import servecast.calibration.microbenchmarks.__main__ as m; "
        "import servecast.calibration.fits.machine; "
        "print([one for one in ('pydantic', 'click', 'torch', 'pandas', 'rich') if one in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
