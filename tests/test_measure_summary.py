"""Raw rounds to figures: exact on scripted rounds, refused where the samples can't carry one, nothing dropped."""

from __future__ import annotations

import random
from statistics import median
from typing import Any

import msgspec
import numpy as np
import pytest

from d2obench.measure.roofline import read_weights_bytes, step_bytes
from d2obench.measure.samples import RequestTrace
from d2obench.measure.summarise import Machine, narrowness, summarise, tpot
from d2obench.metric import METRICS

MIB = 2**20


def round_of(steps: list[float], **changes: Any) -> RequestTrace:
    given = {
        "batch": 2, "gen": len(steps) + 1, "prompt_tokens": 200, "ttft_s": 2.5, "prefill_s": 2.0, "compress_s": 0.5,
        "decode_s": sum(steps), "e2e_s": 2.5 + sum(steps), "loop_s": 0.1 * sum(steps), "step_s": steps,
        "marks": [(0.0, "prefill"), (2.0, "compress"), (2.5, "token"), (2.5, "decode"), (2.5 + sum(steps), "end")],
        "peaks": {
            "prefill": {"rss_bytes": 900 * MIB},
            "compress": {"rss_bytes": 700 * MIB},
            "decode": {"rss_bytes": 800 * MIB},
        },
        "kv_bytes": 40 * MIB, "kv_prompt_bytes": 40 * MIB, "state_bytes": MIB, "requested": 20.0, "effective": 0.2,
        "kept": [[20.0, 20.0], [10.0, 30.0]], "held": [[25.0, 25.0], [15.0, 35.0]], "over": False, "merged": 30,
        "evicted": 120, "merged_layers": [10, 20], "evicted_layers": [40, 80], "tokens_digest": "d",
        "uss_bytes": 500 * MIB,
    }  # fmt: skip
    return RequestTrace(**(given | changes))


MACHINE = Machine(weights_bytes=500 * MIB, read_bytes=400 * MIB, bandwidth=4000.0 * MIB)


def test_times_are_medians_of_all_rounds_and_of_all_steps() -> None:
    rounds = [round_of([1.0, 2.0, 3.0], ttft_s=t) for t in (3.0, 9.0, 4.0)]
    values = summarise(rounds, MACHINE).values
    assert (values["ttft_s"].value, values["ttft_s"].n, values["ttft_s"].kind) == (4.0, 3, "interval")
    assert values["ttft_s"].lo < 3.0 < 9.0 < values["ttft_s"].hi
    assert (values["tpot_s"].value, values["tpot_s"].n) == (2.0, 3)
    assert values["prefill_tok_s"].value == 100.0
    assert values["decode_tok_s"].value == 2 * 3 / 6.0
    assert values["e2e_tok_s"].value == pytest.approx(2 * 4 / 8.5)
    assert values["loop_overhead"].value == pytest.approx(0.1)


def test_a_disturbed_round_is_left_out_of_times_and_counted_in_the_flags() -> None:
    calm, wild = round_of([1.0] * 40), round_of([5.0] * 40, ttft_s=9.0, flags=["other load 35 %"])
    summary = summarise([calm, wild, calm], MACHINE)
    assert (summary.values["tpot_s"].n, summary.values["tpot_s"].value) == (2, 1.0)
    assert (summary.values["ttft_s"].n, summary.values["ttft_s"].value) == (2, 2.5)
    assert summary.values["rss_peak_bytes"].n == 3  # memory does not depend on what else runs
    assert summary.flags == ("1 of 3 rounds left out: other load",)
    assert (summary.details["disturbed"], summary.details["busy"]) == (pytest.approx(1 / 3), False)


def test_rounds_stay_where_most_of_them_are_disturbed_and_the_row_says_so() -> None:
    calm, wild = round_of([1.0] * 40), round_of([5.0] * 40, flags=["other load 35 %"])
    summary = summarise([calm, wild, round_of([1.0] * 40, flags=["waited for a CPU 12 %"])], MACHINE)
    assert summary.values["tpot_s"].n == 3
    assert summary.values["tpot_p95_s"].note == "120 steps can't carry a p95"
    assert summary.flags == ("2 of 3 rounds disturbed: other load, waited for a CPU",)
    assert summary.details["busy"]


def test_what_is_wrong_with_a_request_is_no_disturbance() -> None:
    summary = summarise([round_of([1.0] * 4), round_of([2.0] * 4, flags=["logits are not finite"])], MACHINE)
    assert summary.values["tpot_s"].n == 2
    assert summary.flags == ("1 of 2 rounds: logits are not finite",)
    assert not summary.details["busy"]


def test_percentiles_are_refused_where_the_steps_are_too_few() -> None:
    steps = random.Random(0).sample(range(2000), 2000)
    few = summarise([round_of([1.0] * 71)], MACHINE).values
    assert few["tpot_p95_s"].note == "71 steps can't carry a p95"
    some = summarise([round_of(list(map(float, part))) for part in (steps[:200], steps[200:400])], MACHINE).values
    assert some["tpot_p95_s"].value == pytest.approx(np.quantile(steps[:400], 0.95))
    assert (some["tpot_p99_s"].value, some["tpot_p99_s"].note) == (None, "400 steps can't carry a p99")
    many = summarise([round_of(list(map(float, steps)))], MACHINE).values
    assert many["tpot_p99_s"].value == pytest.approx(0.99 * 1999)


def test_one_round_has_no_interval_and_one_token_no_decode() -> None:
    values = summarise([round_of([])], MACHINE).values
    assert (values["ttft_s"].value, values["ttft_s"].lo, values["ttft_s"].hi) == (2.5, None, None)
    assert values["tpot_s"].value is None
    assert values["tpot_s"].note == "one token has no decode step"
    assert not {"decode_tok_s", "tpot_p95_s", "loop_overhead", "mbu"} & set(values)


def test_memory_is_the_highest_of_all_rounds_with_its_range() -> None:
    low = {"prefill": {"rss_bytes": 850 * MIB}, "decode": {"rss_bytes": 860 * MIB}}
    values = summarise([round_of([1.0]), round_of([1.0], peaks=low)], MACHINE).values
    peak = values["rss_peak_bytes"]
    assert (peak.value, peak.lo, peak.hi, peak.n) == (900 * MIB, 860 * MIB, 900 * MIB, 2)
    assert values["rss_decode_bytes"].value == 860 * MIB
    assert values["rss_compress_bytes"].n == 1
    assert values["workspace_bytes"].value == (900 - 500 - 40) * MIB
    assert "alloc_peak_bytes" not in values


def test_a_gpu_s_workspace_comes_from_its_allocator() -> None:
    peaks = {
        "prefill": {
            "rss_bytes": 9,
            "allocated_bytes": 700 * MIB,
            "requested_bytes": 690 * MIB,
            "reserved_bytes": 800 * MIB,
        }
    }
    values = summarise([round_of([1.0], peaks=peaks)], MACHINE).values
    assert values["workspace_bytes"].value == (700 - 500 - 40) * MIB
    assert values["alloc_requested_bytes"].value == 690 * MIB
    assert values["alloc_prefill_bytes"].value == 700 * MIB
    assert "alloc_decode_bytes" not in values


def test_the_budget_is_counted_over_layers_and_sequences() -> None:
    values = summarise([round_of([1.0])], MACHINE).values
    assert values["budget_effective"].value == 0.2
    assert values["budget_held"].value == (25 + 25 + 15 + 35) / (2 * 200)
    assert values["merged"].value == 0.25
    none = summarise([round_of([1.0], evicted=0, merged=0)], MACHINE)
    assert "merged" not in none.values
    assert "evicted_layers" not in none.details
    counts = summarise([round_of([1.0])], MACHINE).details
    assert (counts["merged_layers"], counts["evicted_layers"]) == ([10, 20], [40, 80])


def test_mbu_is_step_bytes_over_time_over_bandwidth() -> None:
    values = summarise([round_of([0.5, 0.5])], MACHINE).values
    moved = (400 + 40 * (80 + 100) / 2 / 100) * MIB
    assert values["step_bytes"].value == moved
    assert values["mbu"].value == pytest.approx(moved / 0.5 / (4000 * MIB))
    bounds = summarise([round_of([0.5] * 9), round_of([0.4] * 9)], MACHINE).values["mbu"]
    assert bounds.lo is not None
    assert bounds.hi is not None
    assert bounds.value is not None
    assert bounds.lo <= bounds.value <= bounds.hi


def test_a_growing_cache_is_read_half_full_on_average_and_a_bounded_one_whole() -> None:
    assert step_bytes(0, 160, kept=100.0, held=160.0) == 130.0
    assert step_bytes(7, 160, kept=20.0, held=20.0) == 167.0
    assert step_bytes(7, 160, kept=0.0, held=0.0) == 167.0


@pytest.mark.parametrize(("tied", "left_out"), [(True, 0), (False, 1)])
def test_an_input_embedding_is_read_only_where_it_is_the_output_s_too(tied: bool, left_out: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50,
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())
    }
    assert read_weights_bytes(model) == sum(storages.values()) - left_out * 50 * 16 * 4


def test_exact_figures_that_differ_between_rounds_are_named() -> None:
    rounds = [round_of([1.0]), round_of([1.0], kv_bytes=41 * MIB, tokens_digest="e")]
    assert summarise(rounds, MACHINE).flags == ("differs between rounds: kv_bytes, tokens_digest",)


def test_flags_for_what_every_view_must_show() -> None:
    flags = summarise([round_of([1.0, 1.0], step_at=[0, 9], gen=11, over=True)], MACHINE).flags
    assert flags == ("sampled decode", "keeps more than asked")


def test_energy_is_per_token_of_the_whole_request_and_refused_for_a_part_of_it() -> None:
    line: list[list[float | None]] = [
        [float(t), *[None] * 5, 200.0, None, None, None] for t in range(-1, 12)
    ]  # power_w is the sixth column
    machine = MACHINE._replace(idle_w=50.0)
    whole = round_of([1.0, 1.0], device_timeline=line)
    assert summarise([whole], machine).values["energy_j_tok"].value == pytest.approx(4.5 * 150 / 6)
    part = round_of([1.0, 1.0], device_timeline=line, step_at=[0, 5])
    assert summarise([part], machine).values["energy_j_tok"].note == "only a part was run"
    unknown = summarise([whole], MACHINE).values["energy_j_tok"]
    assert (unknown.value, unknown.note) == (None, "too short to tell, or no power known")
    assert "energy_j_tok" not in summarise([round_of([1.0])], machine).values


def test_every_figure_is_in_the_metric_table() -> None:
    machine = MACHINE._replace(idle_w=1.0)
    line: list[list[float | None]] = [[0.0, *[1.0] * 9], [9.0, *[1.0] * 9]]
    assert set(summarise([round_of([1.0] * 400, device_timeline=line)], machine).values) <= set(METRICS)


def test_narrowness_is_the_relative_half_width() -> None:
    assert narrowness([round_of([1.0])]) == float("inf")
    assert narrowness([round_of([1.0] * 3)] * 4) == 0.0
    rounds = [round_of([x] * 5) for x in (1.0, 1.1, 0.9, 1.0, 1.2)]
    found = tpot(rounds)
    assert found.value == median([1.0, 1.1, 0.9, 1.0, 1.2])
    assert narrowness(rounds) == pytest.approx((found.hi - found.lo) / 2 / found.value)  # type: ignore[operator]


def test_rounds_survive_the_way_through_json() -> None:
    one = round_of([1.0, 2.0], flags=["other load 35 %"], timeline=[[0.0, 5.0]])
    kept = msgspec.json.decode(msgspec.json.encode({**msgspec.to_builtins(one), "seconds": 3.5}))
    assert msgspec.convert([kept], list[RequestTrace]) == [one]
