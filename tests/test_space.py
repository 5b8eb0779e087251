"""Search-space files: what is read, what is refused, and where the message points."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from acmds_optimizer.config import TrainConfig, build
from acmds_optimizer.errors import ConfigError
from acmds_tune.space import Space, derived_seed, ordered, parse_constraint
from acmds_tune.space_docs import with_current_tables
from acmds_tune.space_load import load

ROOT = Path(__file__).resolve().parent.parent
SEARCH = "search:\n  lr: {low: 0.001, high: 0.1}\n"


@pytest.fixture
def read(tmp_path: Path) -> Any:
    def read_text(text: str, **options: Any) -> Space:
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return load(path, **options)

    return read_text


@pytest.fixture
def problems(read: Any) -> Any:
    def problems_of(text: str, **options: Any) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            read(text, **options)
        return caught.value.problems

    return problems_of


def test_a_file_with_one_searched_setting_has_defaults_for_the_rest(read: Any) -> None:
    space = read(SEARCH)
    assert space.name == "mine"
    assert space.trials == 20
    assert [(o.name, o.direction) for o in space.objective] == [("samples_per_second", "maximize")]
    assert space.constraints == ["oom_events <= 0"]
    assert (space.sampler, space.pruner, space.seed) == ("tpe", "none", 0)
    assert space.search["lr"].type == "float"


@pytest.mark.parametrize("path", sorted((ROOT / "search_spaces").glob("*.yaml")), ids=lambda path: path.name)
def test_every_search_space_in_the_repository_loads_and_is_headed_by_cost_and_command(path: Path) -> None:
    space = load(path)
    header = path.read_text(encoding="utf-8").split("name:")[0]
    assert space.name == path.stem
    assert "What:" in header
    assert "Cost:" in header
    assert f"acmds-tune search search_spaces/{path.name}" in header


def test_the_reference_page_is_what_the_schema_says() -> None:
    page = (ROOT / "docs" / "search_spaces.md").read_text(encoding="utf-8")
    assert with_current_tables(page) == page, "run: python -m acmds_tune.space_docs docs/search_spaces.md"


def test_the_types_of_searched_settings_follow_from_the_trainer(read: Any) -> None:
    space = read(
        "search:\n"
        "  max_batch_size: {low: 8, high: 64}\n"
        "  weight_decay: {low: 0, high: 1}\n"
        "  optimizer: {values: [adamw, sgd]}\n"
        "  effective_batch_size: {low: 64, high: 256, step: 64}\n"
    )
    assert {name: p.type for name, p in space.search.items()} == {
        "max_batch_size": "int",
        "weight_decay": "float",
        "optimizer": "categorical",
        "effective_batch_size": "int",
    }
    assert isinstance(space.search["weight_decay"].low, float)


def test_a_number_in_exponent_form_without_a_dot_is_a_number(read: Any) -> None:
    space = read("fixed: {weight_decay: 1e-2}\nsearch:\n  lr: {low: 1e-4, high: 1E-1, log: true}\n")
    assert (space.search["lr"].low, space.search["lr"].high) == (1e-4, 0.1)
    assert space.fixed == {"weight_decay": 0.01}


def test_keys_may_be_written_with_dashes(read: Any) -> None:
    assert set(read("search:\n  max-batch-size: {low: 8, high: 64}\n").search) == {"max_batch_size"}


@pytest.mark.parametrize(
    "text",
    [
        "parameters:\n  lr: {min: 1.0e-4, max: 1.0e-1, distribution: log_uniform_values}\n",
        "search_space:\n  lr: {_type: loguniform, _value: [1.0e-4, 1.0e-1]}\n",
        "space:\n  lr: {lower: 1.0e-4, upper: 1.0e-1, log: true}\n",
    ],
    ids=["wandb", "nni", "ray"],
)
def test_other_spellings_of_a_logarithmic_range_mean_the_same(read: Any, text: str) -> None:
    assert read(text) == read("search:\n  lr: {low: 1.0e-4, high: 1.0e-1, log: true}\n")


def test_a_wandb_sweep_is_read(read: Any) -> None:
    space = read(
        "method: bayes\n"
        "metric: {name: val_loss, goal: minimize}\n"
        "run_cap: 12\n"
        "parameters:\n"
        "  lr: {min: 0.001, max: 0.1}\n"
        "  epochs: {value: 3}\n"
        "  optimizer: {values: [adamw, sgd]}\n"
    )
    assert (space.sampler, space.trials, space.fixed) == ("tpe", 12, {"epochs": 3})
    assert [(o.name, o.direction) for o in space.objective] == [("val_loss", "minimize")]
    assert set(space.search) == {"lr", "optimizer"}


def test_keys_of_ray_that_belong_into_a_section_are_moved_there_with_their_unit(read: Any) -> None:
    space = read("num_samples: 5\nmax_concurrent_trials: 2\ntime_budget_s: 90\nbudget: {steps: 7}\n" + SEARCH)
    assert space.trials == 5
    assert space.resources.concurrent_trials == 2
    assert (space.budget.minutes, space.budget.steps) == (1.5, 7)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("timeout: 60\n" + SEARCH, "line 1: timeout: say which: budget.minutes"),
        ("method: grid\n" + SEARCH, "line 1: method: 'grid': a grid is not offered"),
        ("search:\n  lr: {min: 0.1, max: 1, distribution: log_uniform}\n", "its bounds are exponents"),
        ("search:\n  max_batch_size: {low: 8, high: 64, type: randint}\n", "its upper end is excluded"),
        ("search:\n  lr: [0.001, 0.1]\n", "line 2: search.lr: a list could be a range or choices"),
        ("search:\n  lr: 0.1\n", "line 2: search.lr: a plain value belongs under fixed"),
        ("direction: minimize\n" + SEARCH, "write it with its figure"),
        ("early_terminate: {type: hyperband, min_iter: 3}\n" + SEARCH, "'hyperband': not offered; halving is one"),
        ("fixed: {batch_size: 64}\n" + SEARCH, "the trainer has no such setting; there are two: effective_batch_size"),
    ],
)
def test_what_means_something_else_is_refused_with_a_hint(problems: Any, text: str, hint: str) -> None:
    found = problems(text)
    assert len(found) == 1
    assert hint in found[0]


def test_numbers_of_an_nni_range_that_mean_nothing_are_refused(problems: Any) -> None:
    text = "search:\n  lr: {_type: uniform, _value: [0.1, 0.5, 0.2, 9]}\n"
    assert problems(text) == ["line 2: search.lr._value: 4 numbers; a range has low, high and perhaps a step"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "metric: {name: val_loss, direction: minimize, goal: maximize}\n",
            "line 1: metric.goal: the same as direction",
        ),
        ("metric: {name: val_loss, goal: minimize, mode: max}\n", "line 1: metric.mode: the same as direction"),
        ("objective: {metric: val_loss, name: speed}\n", "line 1: objective.metric: the same as name"),
    ],
)
def test_two_directions_of_one_objective_are_refused(problems: Any, text: str, problem: str) -> None:
    assert any(problem in each for each in problems(text + "search: {lr: {low: 0.1, high: 0.2}}\n"))


def test_a_logarithmic_type_that_is_then_denied_is_refused(problems: Any) -> None:
    (problem,) = problems("search: {lr: {type: loguniform, low: 0.1, high: 0.2, log: false}}\n")
    assert "search.lr.log: type loguniform says the opposite" in problem


def test_all_problems_are_reported_at_once_in_the_order_of_the_file(problems: Any) -> None:
    assert problems(
        "trials: 0\n"
        "buget: {steps: 3}\n"
        "constraints: [oom_event <= 0]\n"
        "fixed: {modle: resnet18}\n"
        "search:\n"
        "  lr: {low: 0.1, high: 0.01}\n"
        "  pid_kp: {low: 0, high: 11}\n"
        "  pid_ki: {values: [0.1], when: {optimiser: sgd}}\n"
    ) == [
        "line 1: trials: 0: input should be greater than or equal to 1",
        "line 2: buget: unknown key (did you mean 'budget'?)",
        "line 3: constraints.0: 'oom_event <= 0': no figure is called oom_event (did you mean 'oom_events'?)",
        "line 4: fixed.modle: the trainer has no such setting (did you mean 'model'?)",
        "line 6: search.lr.high: 0.01 must be above low, 0.1",
        "line 7: search.pid_kp.high: 11: input should be less than or equal to 10",
        "line 8: search.pid_ki.when.optimiser: is not searched",
    ]


def test_a_key_written_twice_is_refused_with_both_lines(problems: Any) -> None:
    found = problems("search:\n  lr: {low: 0.1, high: 1}\n  lr: {low: 0.2, high: 1}\n")
    assert found == ["line 3: search.lr: written twice, first on line 2"]


def test_a_value_that_holds_itself_is_refused(problems: Any) -> None:
    assert problems("search: &x\n  lr: {low: 0.1, high: 0.2}\n  more: *x\n")[0] == (
        "line 3: search.more: holds itself, through an alias"
    )
    assert problems(SEARCH + "constraints: &x [*x]\n")[0] == "line 3: constraints.0: holds itself, through an alias"


def test_gpus_of_a_trial_are_whole_or_a_share_of_one(problems: Any, read: Any) -> None:
    assert "must be a whole number, or a share of one GPU" in problems(SEARCH + "resources: {gpus_per_trial: 1.5}")[0]
    assert read(SEARCH + "resources: {gpus_per_trial: 0.5}").resources.gpus_per_trial == 0.5


def test_the_same_key_in_two_spellings_is_refused(problems: Any) -> None:
    assert problems("trials: 3\nn_trials: 4\n" + SEARCH) == [
        "line 2: n_trials: the same as trials on line 1; keep one of them"
    ]


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        ("max_batch_size: {low: 8, high: 64, log: true, step: 8}", "does not go with log: true"),
        ("max_batch_size: {low: 8, high: 65, step: 8}", "65 is not low plus whole steps of 8; write 64"),
        ("weight_decay: {low: 0.0, high: 1.0, log: true}", "must be above 0 on a logarithmic scale"),
        ("lr: {low: 0.1}", "needs low and high, or values"),
        ("lr: {low: 0.1, high: 0.2, values: [0.1]}", "does not go with values"),
        ("model: {low: 1, high: 2}", "has no range; write {values: [...]}"),
        ("max_batch_size: {low: 8, high: 64, type: float}", "'float': max_batch_size must be int"),
        ("max_batch_size: {low: 8.5, high: 64}", "8.5: input should be a valid integer"),
        ("optimizer: {values: [adamw, lion]}", "'lion': input should be 'adamw' or 'sgd'"),
        ("optimizer: {values: [sgd, sgd]}", "the same value twice"),
        ("optimizer: {values: []}", "needs values: a list of choices"),
        ("seed: {low: 0, high: 9}", "cannot be set here: every trial has its own seed"),
        ("device: {values: [cpu, cuda]}", "trials of one search run on one device"),
        ("lr: {low: 0.1, high: 0.2, when: optimizer == sgd}", "'optimizer == sgd': must be a mapping, {name: value}"),
        ("lr: {low: 0.1, high: 0.2, hihg: 3}", "unknown key (did you mean 'high'?)"),
    ],
)
def test_a_range_or_choice_that_the_setting_does_not_allow_is_refused(
    problems: Any, parameter: str, message: str
) -> None:
    found = problems(f"search:\n  {parameter}\n")
    assert message in "\n".join(found)
    assert all(line.startswith("line 2: search.") for line in found)


def test_a_setting_may_not_be_fixed_and_searched(problems: Any) -> None:
    assert problems("fixed: {lr: 0.1}\n" + SEARCH) == ["line 1: fixed.lr: is also searched; keep one of them"]


def test_settings_that_never_go_together_are_refused(problems: Any) -> None:
    found = problems("search:\n  min_batch_size: {low: 32, high: 64}\n  max_batch_size: {low: 8, high: 16}\n")
    assert found == ["line 1: search: no trial could be trained: min_batch_size 32 is above max_batch_size 16"]
    found = problems("fixed: {memory_limit_gb: 2}\n" + SEARCH)
    assert found[0].endswith("no trial could be trained: target_headroom_gb 3 leaves nothing of memory_limit_gb 2")


def test_settings_that_go_together_somewhere_are_accepted(read: Any) -> None:
    read("search:\n  min_batch_size: {low: 128, high: 256}\n  max_batch_size: {low: 64, high: 512}\n")


def test_settings_that_go_together_for_some_choices_in_the_middle_are_accepted(read: Any) -> None:
    text = "search:\n  min_batch_size: {values: [64, 8, 32]}\n  max_batch_size: {values: [16, 128, 24]}\n"
    assert set(read(text).search) == {"min_batch_size", "max_batch_size"}


def test_a_file_without_a_searched_setting_is_refused(problems: Any) -> None:
    assert problems("trials: 3\n") == ["search: is empty; name at least one setting with its range or choices"]


def test_a_numbered_gpu_is_refused_because_each_trial_sees_one(problems: Any) -> None:
    assert "set CUDA_VISIBLE_DEVICES=1" in problems("fixed: {device: 'cuda:1'}\n" + SEARCH)[0]


def test_presets_and_figures_become_objectives_with_their_direction(read: Any) -> None:
    pairs = [
        [(o.name, o.direction) for o in read(f"objective: {text}\n{SEARCH}").objective]
        for text in (
            "pareto",
            "val_accuracy",
            "[val_loss, headroom_min_gb]",
            "{name: seconds, direction: maximize}",
            "gpu_busy_fraction",
            "{metric: seconds, mode: max}",
        )
    ]
    assert pairs == [
        [("samples_per_second", "maximize"), ("val_loss", "minimize")],
        [("val_accuracy", "maximize")],
        [("val_loss", "minimize"), ("headroom_min_gb", "maximize")],
        [("seconds", "maximize")],
        [("gpu_busy_fraction", "maximize")],
        [("seconds", "maximize")],
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "fixed: {model: resnet81, dataset: digts}",
            [
                "line 1: fixed.model: no model named 'resnet81': did you mean resnet18",
                "line 1: fixed.dataset: no data set and no folder named 'digts' (did you mean 'digits'?)",
            ],
        ),
        ("fixed: {dataset: my/images}", ["line 1: fixed.dataset: my/images: no such folder. Expected train/ and val/"]),
        ("fixed: {dataset: 'my.module:images', model: 'my.module:model'}", []),
    ],
)
def test_models_and_data_sets_that_are_not_there_are_told_before_a_trial(
    read: Any, problems: Any, text: str, problem: list[str]
) -> None:
    found = problems(f"{text}\n{SEARCH}") if problem else []
    assert len(found) == len(problem)
    assert all(told.startswith(said) for told, said in zip(found, problem, strict=True))
    assert read(f"{text}\n{SEARCH}", elsewhere=True), "on other machines they may be"


def test_a_misspelt_model_among_those_that_are_searched_is_told_with_its_line(problems: Any) -> None:
    text = "search:\n  model:\n    values:\n      - resnet18\n      - resnet_50\n"
    assert problems(text)[0].startswith(
        "line 5: search.model.values.1: no model named 'resnet_50': did you mean resnet50"
    )


def test_an_unknown_figure_is_refused_with_the_nearest(problems: Any) -> None:
    assert "(did you mean 'val_accuracy'?)" in problems("objective: val_acuracy\n" + SEARCH)[0]


def test_an_objective_without_a_figure_is_refused(problems: Any) -> None:
    assert "objective: names no figure" in problems("objective: []\n" + SEARCH)[0]
    (problem,) = problems("objective: [{mode: min}]\n" + SEARCH)
    assert "objective.0: {'direction': 'minimize'}: write speed, pareto, a figure, or {name: ..., direction:" in problem


def test_a_pruner_needs_one_objective_that_a_running_trial_reports(problems: Any) -> None:
    assert "pruner: needs one objective" in problems("objective: pareto\npruner: asha\n" + SEARCH)[0]


def test_a_sampler_that_takes_one_objective_is_refused_for_several(problems: Any, read: Any) -> None:
    text = "objective: pareto\nsampler: cma-es\n" + SEARCH
    assert problems(text) == ["line 2: sampler: cmaes takes one objective; tpe and gp take several"]
    assert read(text.replace("cma-es", "gp")).sampler == "gp"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "objective: val_loss\nfixed: {dataset: digits, val_fraction: 0}",
            "line 1: objective: val_loss is never measured: val_fraction is 0, so no sample of digits is held out",
        ),
        (
            "constraints: [val_accuracy >= 0.5]\nfixed: {dataset: digits, val_fraction: 0}",
            "line 1: constraints.0: val_accuracy is never measured: val_fraction is 0, so no sample of digits is held "
            "out",
        ),
        (
            "objective: [speed, gpu_busy_fraction]\nfixed: {device: cpu}",
            "line 1: objective: gpu_busy_fraction is never measured: device is cpu",
        ),
        ("objective: val_loss\nfixed: {dataset: digits}", ""),
        ("objective: val_loss\nfixed: {dataset: cifar10, val_fraction: 0}", ""),  # has images of its own for it
        ("objective: speed\nfixed: {dataset: digits, val_fraction: 0, device: cpu}", ""),
        ("objective: gpu_busy_fraction\nfixed: {device: cuda}", ""),
    ],
)
def test_a_figure_that_no_trial_could_measure_is_refused(read: Any, problems: Any, text: str, problem: str) -> None:
    if problem:
        assert problems(f"{text}\n{SEARCH}") == [problem]
    else:
        assert read(f"{text}\n{SEARCH}")


def test_a_validation_share_that_is_searched_is_not_refused(read: Any) -> None:
    assert read("objective: val_loss\nfixed: {dataset: digits}\nsearch: {val_fraction: {low: 0.0, high: 0.5}}\n")


def test_a_constraint_measures_how_far_a_figure_is_on_the_wrong_side() -> None:
    most = parse_constraint("headroom_breach_fraction<=0.05")
    assert most.violation(0.25) == pytest.approx(0.2)
    assert most.violation(0.05) == 0.0
    assert most.violation(None) == 1.0
    assert parse_constraint("val_accuracy >= 0.9").violation(0.8) == pytest.approx(0.1)


@pytest.mark.parametrize("text", ["oom_events", "oom_events < 1", "oom_events <= few", "<= 3", "oom_events == 0"])
def test_what_is_not_a_constraint_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"oom_events|write"):
        parse_constraint(text)


def test_conditions_come_before_what_depends_on_them(read: Any) -> None:
    space = read(
        "search:\n"
        "  weight_decay: {low: 0.0, high: 0.1, when: {optimizer: adamw}}\n"
        "  optimizer: {values: [sgd, adamw]}\n"
    )
    assert ordered(space.search) == ["optimizer", "weight_decay"]


def test_conditions_that_go_in_a_circle_are_refused(problems: Any) -> None:
    found = problems(
        "search:\n"
        "  optimizer: {values: [sgd, adamw], when: {batch_policy: free}}\n"
        "  batch_policy: {values: [hold, free], when: {optimizer: sgd}}\n"
    )
    assert found == ["line 1: search: the conditions under `when` go in a circle"]


def test_set_replaces_a_fixed_setting_and_refuses_a_searched_one(read: Any, problems: Any) -> None:
    text = "fixed: {epochs: 3}\n" + SEARCH
    assert read(text, fixed={"epochs": "5", "enable-amp": "no"}).fixed == {"epochs": 5, "enable_amp": False}
    assert problems(text, fixed={"lr": "1"}) == ["--set lr: is searched in the file; remove it there to fix it"]
    assert problems(text, fixed={"epochs": "x"})[0].startswith("--set epochs: 'x':")


def test_a_set_value_that_is_no_yaml_is_a_problem_and_not_a_traceback(problems: Any) -> None:
    assert problems(SEARCH, fixed={"data_dir": "@home"})[0].startswith("--set data_dir: '@home': is not valid YAML")


@pytest.mark.parametrize(
    "text",
    [
        "fixed: x\n" + SEARCH,
        "fixed: {lr: 1}\nsearch: [lr]\n",
        "search: true\n",
        "resources: 1\nmax_concurrent_trials: 2\n" + SEARCH,
        "search:\n  lr: {_type: uniform, _value: 3}\n",
    ],
)
def test_a_section_of_the_wrong_kind_is_a_problem_and_not_a_traceback(problems: Any, text: str) -> None:
    assert problems(text, fixed={"epochs": "3"})


@pytest.mark.parametrize(
    "text",
    [
        "a: " + 5000 * "[",
        "name: 2024-13-45\n" + SEARCH,
        "seed: 0x_\n" + SEARCH,
        "seed: " + 5000 * "1" + "\n" + SEARCH,
        "name: " + 300 * "a" + "\n" + SEARCH,
        "fixed: [a]\nsearch: {lr: {value: 3}, weight_decay: {low: 0, high: 1}}\n",
        "pruner: {type: [a], min_iter: 3}\n" + SEARCH,
        "search: {lr: {low: 0.1, high: 0.9, step: 1.0e-320}}\n",
        "search: {max_batch_size: {low: 64, high: 1" + 400 * "0" + "}}\n",
        "requires: ['" + 5000 * "not " + "lr > 0']\n" + SEARCH,
        "requires: ['" + 400 * "lr + " + "lr > 0']\n" + SEARCH,
        "requires: ['lr * 1" + 400 * "0" + " < none']\n" + SEARCH + "  0x_: 3\n",
    ],
)
def test_what_cannot_be_read_or_counted_is_a_problem_and_not_a_traceback(problems: Any, text: str) -> None:
    assert problems(text)


@pytest.mark.parametrize("text", ["2024-13-45", "0x_", 5000 * "["])
def test_a_set_value_that_cannot_be_read_is_a_problem_and_not_a_traceback(problems: Any, text: str) -> None:
    assert "is not valid YAML" in problems(SEARCH, fixed={"dataset": text})[0]


def test_a_logarithmic_scale_of_choices_is_refused(problems: Any) -> None:
    text = "search:\n  lr: {values: [0.1, 0.2], log: true}\n"
    assert problems(text) == ["line 2: search.lr.log: does not go with values; keep one of them"]


def test_a_preset_that_is_written_as_a_figure_is_refused_with_what_to_write(problems: Any) -> None:
    (problem,) = problems("objective: {name: speed}\n" + SEARCH)
    assert problem.endswith("write it by itself: speed")


def test_a_key_of_ray_and_the_section_it_belongs_to_go_together_but_not_the_same_twice(
    read: Any, problems: Any
) -> None:
    assert read("resources:\nmax_concurrent_trials: 2\n" + SEARCH).resources.concurrent_trials == 2
    text = "max_concurrent_trials: 2\nresources: {concurrent_trials: 3}\n" + SEARCH
    assert problems(text) == [
        "line 1: max_concurrent_trials: the same as resources.concurrent_trials on line 2; keep one of them"
    ]


def test_options_of_the_command_line_replace_keys_of_the_file(read: Any) -> None:
    space = read("name: a\ntrials: 3\n" + SEARCH, overrides={"name": "b", "trials": None})
    assert (space.name, space.trials) == ("b", 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\n", "line 2: is not valid YAML"),
        ("- 1\n", "must hold keys and values"),
        ("", "must hold keys and values"),
    ],
)
def test_what_is_no_yaml_mapping_is_refused(problems: Any, text: str, message: str) -> None:
    assert problems(text)[0].startswith(message)


def test_a_missing_file_is_a_problem_and_not_a_traceback(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load(tmp_path / "none.yaml")


def test_every_trial_has_its_own_seed_that_the_trainer_accepts() -> None:
    seeds = {derived_seed(study, number) for study in range(3) for number in range(50)}
    assert len(seeds) == 150
    build(TrainConfig, {"seed": max(seeds)}, "test")


def test_a_trial_trains_for_its_budget_and_the_best_settings_do_not_hold_it(read: Any) -> None:
    space = read("budget: {steps: 7, epochs: 2}\nfixed: {epochs: 50}\n" + SEARCH)
    assert space.trial_limits({}) == {"max_steps": 7, "epochs": 2, "checkpoint_every": 0}
    assert space.settings({"lr": 0.01}) == {"epochs": 50, "lr": 0.01}


def test_a_short_trial_is_short_also_where_settings_bound_it_and_keeps_what_is_searched(read: Any) -> None:
    space = read("fixed: {max_steps: 100, max_seconds: 60}\nsearch: {epochs: {low: 2, high: 20}}\n")
    short = {"max_steps": 25, "max_seconds": 15.0, "epochs": 4, "checkpoint_every": 0}
    assert space.trial_limits({"epochs": 16}, 0.25) == short
    assert space.trial_limits({"epochs": 16}) == {"checkpoint_every": 0}


@pytest.mark.parametrize(
    ("search", "problem"),
    [
        ("direction: {values: [easy, hard]}", "search.direction: must have none among its values"),
        ("noise_rate: {low: 0.1, high: 0.4}", "search.noise_rate: must have 0.0 among its values"),
        ("start_resolution: {low: 0.3, high: 0.8}", "search.start_resolution: must have 1.0 among its values"),
        ("start_fraction: {low: 0.2, high: 0.8}", "search.start_fraction: acts only with direction"),
        ("resolution_stages: {values: [2, 4]}", "search.resolution_stages: acts only with start_resolution"),
        ("noise_action: {values: [ignore, relabel]}", "search.noise_action: acts only with direction or noise_rate"),
    ],
)
def test_a_search_over_a_curriculum_must_hold_the_run_without_it(problems: Any, search: str, problem: str) -> None:
    assert any(problem in said for said in problems(f"search: {{{search}}}"))


def test_a_search_over_a_curriculum_with_its_controls_is_accepted(read: Any) -> None:
    space = read(
        """
        search:
          direction: {values: [none, easy]}
          start_fraction: {low: 0.2, high: 0.8, when: {direction: [easy]}}
          noise_rate: {values: [0, auto, 0.2]}
          noise_action: {values: [ignore, relabel]}
          start_resolution: {low: 0.5, high: 1.0}
          resolution_stages: {low: 2, high: 5}
        """
    )
    assert space.search["noise_rate"].values == [0.0, "auto", 0.2]
