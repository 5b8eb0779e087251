"""Random studies, machines, ends, interruptions and kills: each study is whole in the end, and nothing runs twice."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from acmds_tune.objective import Ended
from acmds_tune.records import DEFAULT, StudyRecord, ranked
from acmds_tune.space import Space
from acmds_tune.space_load import load
from acmds_tune.stages import MOST_TRIES, Wait
from acmds_tune.study import Proposal, SearchStudy
from tests.fake_objectives import figures

SPACE = """
fixed: {device: cpu, dataset: digits, model: small_cnn}
search:
  max_batch_size: {low: 16, high: 256, log: true}
  lr: {low: 0.0001, high: 0.1, log: true}
sampler: random
"""


def random_space(folder: Path, rng: random.Random) -> tuple[Space, str]:
    trials = rng.randint(2, 8)
    lines = [f"trials: {trials}"]
    baselines = [name for name in ("default", "fixed batch", "halving") if rng.random() < 0.7]
    lines += [f"baselines: [{', '.join(baselines)}]"] if baselines else []
    lines += [f"confirm: {{top: {rng.randint(1, 3)}, seeds: {rng.randint(1, 3)}}}"] if rng.random() < 0.8 else []
    lines += [f"screen: {{trials: {rng.randint(trials, 10)}, share: 0.3}}"] if rng.random() < 0.4 else []
    lines += [f"anchor_every: {rng.randint(2, 3)}"] if rng.random() < 0.5 else []
    lines += ["constraints: [oom_events <= 0]"] if rng.random() < 0.5 else []
    text = SPACE + "\n".join(lines) + "\n"
    (folder / "s.yaml").write_text(text, encoding="utf-8")
    return load(folder / "s.yaml"), text


def random_end(proposal: Proposal, rng: random.Random) -> Ended:
    """Fastest at batches of 100 and lr 0.01; large batches run out of memory."""
    if rng.random() < 0.05:
        return Ended("error", "bad luck", {}, 1.0)
    batch, lr = proposal.settings["max_batch_size"], proposal.settings["lr"]
    speed = 1000 - abs(batch - 100) - 1000 * abs(lr - 0.01) + 5 * rng.random()
    made = {"samples_per_second": speed, "oom_events": int(batch > 200), "batch_size_mean": float(batch)}
    return Ended("ok", "finished", figures() | made, 1.0)


def whole_study(space: Space, text: str, folder: Path, rng: random.Random) -> StudyRecord:
    study = SearchStudy.create(folder / "s", space, text, {})
    running: dict[int, Proposal] = {}
    places = rng.choice((1, 2, 3, 5))
    while study.missing or running:
        if study.missing and len(running) < places and not isinstance(study.next_step(), Wait):
            proposal = study.propose()
            running[proposal.number] = proposal
            continue
        assert running, "it waits for nothing"
        number = rng.choice(list(running))
        ended, interrupted = random_end(running.pop(number), rng), rng.random() < 0.08
        study.finish(number, Ended("stopped", "Ctrl-C") if interrupted else ended, interrupted=interrupted)
        if rng.random() < 0.05:  # killed
            running.clear()
            study.close()
            study = SearchStudy.resume(folder / "s", space, text, {})
    study.close()
    return study.record()


@pytest.mark.parametrize("seed", range(30))
def test_a_study_is_whole_whatever_runs_beside_what_and_is_cut_off(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    space, text = random_space(tmp_path, rng)
    record = whole_study(space, text, tmp_path, rng)
    rows = [row for row in record.trials if not row.interrupted]
    cut_off = Counter((row.stage, row.label) for row in record.trials if row.interrupted)
    given_up = {label for (_, label), times in cut_off.items() if times >= MOST_TRIES}
    asked, stage = (space.screen.trials, "screen") if space.screen.trials else (space.trials, "search")
    assert sum(row.stage == stage for row in rows) == asked
    later = Counter((row.stage, row.label, row.seed) for row in rows if row.stage in ("train", "baseline", "confirm"))
    assert set(later.values()) <= {1}
    begun = {label for what, label, _ in later if what == "baseline"} | given_up
    assert "halving" not in space.baselines or "halving" in begun
    assert "fixed batch" not in space.baselines or any(label.startswith("fixed batch") for label in begun)
    seeds = Counter(label for what, label, _ in later if what == "confirm")
    best = ranked(record, most=space.confirm.top) if space.confirm.top else []
    again = {f"trial {row.number}" for row in best}
    assert {label for label in seeds if label.startswith("trial ")} - given_up == again - given_up
    if "default" in space.baselines and space.confirm.top and "default" not in given_up:
        assert ("default" in seeds) is not any(row.label == DEFAULT for row in best)
    assert all(count == space.confirm.seeds for label, count in seeds.items() if label not in given_up)
