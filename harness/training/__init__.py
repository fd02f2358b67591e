"""Training loop, augmentation, schedules."""
