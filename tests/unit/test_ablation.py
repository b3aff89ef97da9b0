"""The ablation: its statistics, its plan, and that it goes on where it stopped."""

from pathlib import Path

import pytest
from ablation.plan import METHODS, Job, plan, summary_of
from ablation.run import JobFailed, run_jobs
from ablation.table import mean_over_seeds, report, verdict

from osft_mcore.config.load import load_config
from osft_mcore.train.schedules import sampling_temperature, train_temperature


def test_the_interval_is_students() -> None:
    # Three values with mean 2 and standard deviation 1: half width 4.303 / sqrt(3).
    found = mean_over_seeds([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert (found.low, found.high) == pytest.approx((2 - 2.4843, 2 + 2.4843), abs=1e-3)


@pytest.mark.parametrize(
    ("above", "below", "said"),
    [
        ([0.5, 0.52, 0.51], [0.3, 0.31, 0.32], "holds"),
        ([0.3, 0.31, 0.32], [0.5, 0.52, 0.51], "is reversed"),
        ([0.5, 0.3, 0.4], [0.3, 0.5, 0.35], "is not decided"),
    ],
)
def test_an_order_holds_only_where_the_interval_says_so(
    above: list[float], below: list[float], said: str
) -> None:
    gap, found = verdict(above, below)
    assert found == said
    assert gap.mean == pytest.approx((sum(above) - sum(below)) / 3)
    # Seed by seed: what seeds have in common is not in the interval.
    shared = verdict([0.1, 0.5, 0.9], [0.0, 0.4, 0.8])[0]
    assert (shared.low, shared.high) == pytest.approx((0.1, 0.1))


def test_the_report_names_the_best_temperature_and_every_seed() -> None:
    scores = {method: [0.2, 0.3, 0.4] for method in METHODS} | {"OSFT": [0.5, 0.6, 0.55]}
    text = report({"1": 0.25, "0": 0.8, "0.6": 0.7}, scores)
    assert "| base, best temperature | 0 | 80.0% |" in text
    assert "| OSFT | 1 | 55.0% | 42.6% to 67.4% | 50.0%, 60.0%, 55.0% |" in text
    assert "| OSFT > coupled | +25.0 | +3.5 to +46.5 | holds |" in text


def test_every_command_of_the_plan_is_understood_and_differs_only_in_its_method() -> None:
    out = Path("somewhere")
    jobs = plan(out, seeds=(1, 2), steps=20)
    assert len({job.result for job in jobs}) == len(jobs)
    assert {summary_of(out, method, seed) for method in METHODS for seed in (1, 2)} <= {
        job.result for job in jobs
    }
    configs = {
        job.name: load_config(job.command[2:]) for job in jobs if job.command[:1] == ("osft",)
    }
    osft, coupled = configs["OSFT, seed 2"], configs["coupled, seed 2"]
    em, offline = configs["EM-FT, seed 2"], configs["offline, seed 2: training"]
    assert (osft.rollout.tau_sample, coupled.rollout.tau_sample) == (0.6, 1.0)
    assert (osft.algorithm, osft.train) == (coupled.algorithm, coupled.train)
    assert (osft.seed, osft.train.steps) == (2, 20)
    assert (em.algorithm.objective, train_temperature(em.algorithm, 1.0)) == ("entropy", 1.0)
    assert em.train == offline.train == osft.train
    assert offline.algorithm == osft.algorithm
    annealing = configs["OSFT, annealed 0.6 to 1, seed 1"].rollout.annealing
    first, last = (
        sampling_temperature(0.6, annealing, step=step, steps_per_epoch=39) for step in (1, 20)
    )
    assert (first, last) == (0.6, pytest.approx(1.0, abs=0.05))


def touching(path: Path, name: str = "job") -> Job:
    code = f"open({str(path)!r}, 'a').write('x')"
    return Job(name=name, command=("python", "-c", code), result=path)


def test_what_is_done_is_not_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = touching(tmp_path / "result")
    for _ in range(2):
        run_jobs([job], logs=tmp_path / "logs")
    assert job.result.read_text() == "x"
    assert capsys.readouterr().out.splitlines()[1] == "[1/1] job: is there"
    other = Job(name="job", command=("python", "-c", "pass"), result=job.result)
    with pytest.raises(JobFailed, match="results of other options; remove it or choose another"):
        run_jobs([other], logs=tmp_path / "logs")


def test_a_failure_ends_it_and_is_told(tmp_path: Path) -> None:
    fails = Job(
        name="fails",
        command=("python", "-c", "import sys; print('because'); sys.exit(3)"),
        result=tmp_path / "never",
    )
    after = touching(tmp_path / "after")
    with pytest.raises(JobFailed, match=r"because\n\[1/2\] fails: exit code 3; see .*\.log"):
        run_jobs([fails, after], logs=tmp_path / "logs")
    assert not after.result.exists()
    # Success without the result is none.
    silent = Job(name="s", command=("python", "-c", "pass"), result=tmp_path / "never")
    with pytest.raises(JobFailed, match="exit code 0"):
        run_jobs([silent], logs=tmp_path / "other")
