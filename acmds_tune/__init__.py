"""acmds-tune: searches the settings of the trainer with Ray Tune and Optuna, and reports what it found."""
