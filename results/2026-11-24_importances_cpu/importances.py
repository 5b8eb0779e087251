"""Importances of settings after a search: Optuna's default, PED-ANOVA, and fANOVA with trees of depth 6.

The objective has the throughput that a search of ResNet-50 on an H200 measured (results/2026-11-24_tuner-study_h200):
fp16 is a third faster than bf16, ceilings of 64 and 96 are 10 and 9 % slower than the others, the other five settings
do nothing, and runs differ by 15 samples/s. TPE as Optuna has it, 10 seeds, means.
"""

import random
import statistics

import optuna
from optuna.importance import FanovaImportanceEvaluator, PedAnovaImportanceEvaluator, get_param_importances

NOTHING = ("min_batch_size", "knee_gain_fraction", "pid_kp", "pid_ki", "pid_kd")
optuna.logging.set_verbosity(optuna.logging.ERROR)


def search(trials: int, seed: int) -> optuna.Study:
    """One search."""
    noise = random.Random(seed)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))

    def speed(trial: optuna.Trial) -> float:
        fp16 = trial.suggest_categorical("amp_dtype", ["bf16", "fp16"]) == "fp16"
        ceiling = trial.suggest_int("max_batch_size", 64, 256, step=32)
        trial.suggest_categorical("min_batch_size", [8, 16, 32, 64])
        for name, high in (("knee_gain_fraction", 0.1), ("pid_kp", 0.5), ("pid_ki", 0.5), ("pid_kd", 0.5)):
            trial.suggest_float(name, 0.0, high)
        return {64: 5100.0, 96: 5190.0}.get(ceiling, 5710.0) * (1.0 if fp16 else 0.757) + noise.gauss(0.0, 15.0)

    study.optimize(speed, n_trials=trials)
    return study


print("trials,method,amp_dtype,max_batch_size,settings_that_do_nothing")
for trials in (30, 100):
    studies = [search(trials, seed) for seed in range(10)]
    for method, evaluator in (
        ("PED-ANOVA", PedAnovaImportanceEvaluator()),
        ("fANOVA", FanovaImportanceEvaluator(max_depth=6, seed=0)),
    ):
        found = [get_param_importances(study, evaluator=evaluator) for study in studies]
        shares = [[each["amp_dtype"], each["max_batch_size"], sum(each[name] for name in NOTHING)] for each in found]
        means = [f"{statistics.fmean(float(value) for value in values):.3f}" for values in zip(*shares, strict=True)]
        print(trials, method, *means, sep=",")
