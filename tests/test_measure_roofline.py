"""The largest speed-up that bytes and measured bandwidth allow, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from d2obench.measure.roofline import largest_speedup

WINDOWS = [[0.010, 0.010, 0.012], [0.011] * 3, [0.020] * 3, [0.030] * 3]
"""Windows of full: medians of 10, 11, 20 and 30 ms; the faster half has the median 10.5 ms."""


def test_the_largest_speed_up_by_hand() -> None:
    """The policy's 50 bytes take at least 2.5 ms at 20,000 bytes/s, and 10.5 ÷ 2.5 = 4.2."""
    found = largest_speedup(WINDOWS, full_bytes=100, policy_bytes=50, bandwidth=20_000, typical=16_000)
    assert found is not None
    assert found.value == pytest.approx(4.2)
    # 10.5 ÷ 10 and 20,000 ÷ 16,000: their logarithms are 0.04879 and 0.22314, together 0.22841: a factor of 1.25660
    assert (found.lo, found.hi) == pytest.approx((4.2 / 1.25660, 4.2 * 1.25660), rel=1e-4)
    assert (found.n, found.kind) == (4, "range")


def test_full_that_reads_faster_than_a_copy_shows_the_bandwidth() -> None:
    """Full reads 100 bytes in 10 ms, 10,000 bytes/s, where a copy gave 4,000: 10.5 ms against 50 bytes in 5 ms."""
    found = largest_speedup(WINDOWS, full_bytes=100, policy_bytes=50, bandwidth=4_000, typical=4_000)
    assert found is not None
    assert found.value == pytest.approx(2.1)
    assert found.hi == pytest.approx(2.1 * 1.05)


def test_one_window_and_steady_copies_leave_no_doubt() -> None:
    found = largest_speedup([[0.01]], full_bytes=100, policy_bytes=100, bandwidth=10_000, typical=10_000)
    assert found is not None
    assert (found.value, found.lo, found.hi, found.n) == pytest.approx((1.0, 1.0, 1.0, 1))


def test_a_disturbance_of_half_of_the_windows_does_not_raise_it() -> None:
    """What a busy core does to full must not make a false speed-up of 20 look possible."""
    calm = largest_speedup([[0.010]] * 8, 100, 90, 12_000, 11_000)
    burst = largest_speedup([[0.010]] * 4 + [[0.200]] * 4, 100, 90, 12_000, 11_000)
    assert calm is not None and burst is not None
    assert burst.value == calm.value == pytest.approx(0.010 * 12_000 / 90)
    assert burst.hi is not None and burst.hi < 2


def test_nothing_is_said_without_a_step_of_full() -> None:
    assert largest_speedup([], 100, 50, 1.0, 1.0) is None
    assert largest_speedup([[], []], 100, 50, 1.0, 1.0) is None


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_units_do_not_matter(scale: float) -> None:
    """Time × bandwidth ÷ bytes has no unit: another unit of time changes nothing."""
    one = largest_speedup(WINDOWS, 100, 50, 20_000, 16_000)
    slower = [[seconds * scale for seconds in window] for window in WINDOWS]
    other = largest_speedup(slower, 100, 50, 20_000 / scale, 16_000 / scale)
    assert one is not None and other is not None
    assert (one.value, one.lo, one.hi) == pytest.approx((other.value, other.lo, other.hi))
