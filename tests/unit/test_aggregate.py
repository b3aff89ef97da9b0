"""The aggregate over benchmarks, held against the published tables."""

import json
from pathlib import Path

import pytest

from osft_mcore.evaluation.aggregate import Headline, best_temperature, headline

TABLES = json.loads((Path(__file__).parents[1] / "golden" / "paper_tables.json").read_text())

# pass@1 / pass@8 / pass@32 / AVG as published, means over the six benchmarks.
PUBLISHED = [
    ("table7", "Qwen2.5-Math-7B", "Baseline", (22.7, 47.3, 61.0, 43.7)),
    ("table7", "Qwen2.5-Math-7B", "SePT", (39.5, 57.7, 67.9, 55.0)),
    ("table7", "Qwen2.5-Math-7B", "GRPO", (43.8, 61.8, 71.6, 59.1)),
    ("table7", "Qwen2.5-7B", "Baseline", (21.3, 48.7, 62.2, 44.1)),
    ("table7", "Qwen2.5-7B", "SePT", (32.3, 54.6, 65.3, 50.7)),
    ("table7", "Qwen2.5-7B", "GRPO", (39.2, 56.6, 66.1, 54.0)),
    ("table7", "Qwen2.5-7B-Instruct", "Baseline", (36.8, 56.6, 67.3, 53.6)),
    ("table7", "Qwen2.5-7B-Instruct", "SePT", (36.6, 56.8, 69.0, 54.1)),
    ("table7", "Qwen2.5-7B-Instruct", "GRPO", (39.6, 56.3, 67.5, 54.5)),
    ("table7", "DeepSeek-Math-7B-Instruct", "Baseline", (15.4, 34.6, 48.1, 32.7)),
    ("table7", "DeepSeek-Math-7B-Instruct", "SePT", (15.9, 35.5, 50.3, 33.9)),
    ("table7", "DeepSeek-Math-7B-Instruct", "GRPO", (18.2, 37.7, 51.0, 35.6)),
    ("table9", "Qwen2.5-Math-7B", "EM-FT", (29.9, 56.8, 67.3, 51.3)),
    ("table9", "DeepSeek-Math-7B-Instruct", "EM-FT", (15.8, 34.7, 46.9, 32.5)),
    ("table10", "Qwen2.5-Math-7B", "SePT (Offline)", (21.0, 50.2, 65.2, 45.5)),
    ("table11", "Qwen2.5-Math-7B", "Coupling", (19.3, 50.1, 64.3, 44.6)),
    ("table8", "Qwen2.5-Math-7B", "GRPO/OTM", (39.5, 59.0, 71.4, 56.6)),
    ("table8", "Qwen2.5-Math-7B", "SePT/OTM", (40.8, 58.6, 66.2, 55.2)),
    ("table8", "DeepSeek-Math-7B-Instruct", "GRPO/OTM", (16.9, 35.1, 48.2, 33.4)),
    ("table8", "DeepSeek-Math-7B-Instruct", "SePT/OTM", (15.8, 35.1, 48.2, 33.0)),
    ("table12", "Llama-3.1-8B-Instruct", "Baseline", (20.5, 40.9, 55.3, 38.9)),
    ("table12", "Llama-3.1-8B-Instruct", "SePT/DSR", (20.0, 39.8, 53.4, 37.8)),
    ("table12", "Llama-3.1-8B-Instruct", "GRPO/DSR", (25.2, 44.0, 54.4, 41.2)),
    ("table12", "Llama-3.1-8B-Instruct", "SePT/OTM", (20.1, 40.4, 54.1, 38.2)),
    ("table12", "Llama-3.1-8B-Instruct", "GRPO/OTM", (19.7, 39.9, 50.9, 36.8)),
]


@pytest.mark.parametrize(("table", "model", "method", "published"), PUBLISHED, ids=str)
def test_the_published_headlines_come_out(
    table: str, model: str, method: str, published: tuple[float, ...]
) -> None:
    by_benchmark = {
        benchmark: dict(zip(TABLES["k"], scores, strict=True))
        for benchmark, scores in TABLES[table][model][method].items()
    }
    assert len(by_benchmark) == 6
    found = headline(by_benchmark)
    assert list(found.pass_at) == [1, 8, 32]
    # Of figures that were rounded to 0.1 before they were averaged, and after.
    assert [*found.pass_at.values(), found.average] == pytest.approx(published, abs=0.1)


def test_a_k_counts_if_every_benchmark_has_it() -> None:
    found = headline({"a": {1: 0.2, 4: 0.3, 8: 0.4}, "b": {1: 0.4, 4: 0.5}})
    assert found.pass_at == pytest.approx({1: 0.3})
    assert found.average == pytest.approx(0.3)


@pytest.mark.parametrize("nothing", [{}, {"a": {8: 0.5}}])
def test_nothing_to_average_is_refused(nothing: dict[str, dict[int, float]]) -> None:
    with pytest.raises(ValueError, match="at least one benchmark"):
        headline(nothing)


def test_the_best_temperature_has_the_highest_average_not_the_highest_pass_at_1() -> None:
    greedy, warm = Headline(pass_at={1: 0.5, 8: 0.5}), Headline(pass_at={1: 0.4, 8: 0.7})
    assert best_temperature({0.0: greedy, 0.6: warm, 1.0: warm}) == 0.6
    with pytest.raises(ValueError, match="same k"):
        best_temperature({0.0: Headline(pass_at={1: 0.9}), 0.6: warm})
