"""What the trainers share: settings, the run from step to result file, checkpoints, devices."""
