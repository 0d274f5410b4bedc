"""The nearest kept key of every evicted one: by the compiled loop and by products, against float64."""

from __future__ import annotations

import pytest
import torch

from d2obench import cpu
from d2obench.policies.merging import nearest


@pytest.fixture(params=["loop", "products"])
def way(request, monkeypatch):
    if request.param == "products":
        monkeypatch.setattr(cpu, "available", lambda: False)
    elif not cpu.available():
        pytest.skip("compiled loops cannot run here")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("rows", "count", "slots", "width"), [(1, 1, 1, 8), (2, 5, 7, 16), (3, 33, 100, 80), (2, 40, 16, 64), (4, 0, 9, 8)]
)
@pytest.mark.parametrize("barred", [False, True])
@pytest.mark.usefixtures("way")
def test_it_is_the_highest_cosine(rows, count, slots, width, barred):
    generator = torch.Generator().manual_seed(count)
    evicted, kept = (torch.randn(rows, n, width, generator=generator) for n in (count, slots))
    hosts = torch.rand(rows, slots, generator=generator) > (0.4 if barred else -1)
    hosts[:, -1] = True
    cosine = torch.cosine_similarity(evicted.double()[:, :, None], kept.double()[:, None], dim=-1)
    expected, place = cosine.masked_fill(~hosts[:, None], -torch.inf).max(-1)
    found, host = nearest(evicted, kept, hosts)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(host, place)


@pytest.mark.usefixtures("way")
def test_the_first_of_equals_wins_and_without_a_host_there_is_none():
    kept = torch.ones(2, 40, 16)
    hosts = torch.ones(2, 40, dtype=torch.bool)
    hosts[0, :3], hosts[1] = False, False
    found, host = nearest(torch.ones(2, 7, 16), kept, hosts)
    assert host[0].tolist() == [3] * 7 and torch.allclose(found[0], torch.ones(7))
    assert (found[1] == -torch.inf).all()


@pytest.mark.usefixtures("way")
def test_zero_keys_are_near_to_nothing():
    found, _ = nearest(torch.zeros(1, 3, 8), torch.randn(1, 5, 8), torch.ones(1, 5, dtype=torch.bool))
    assert (found == 0).all()
