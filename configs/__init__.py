"""Runnable configurations: each module has `get_config(arg=None) -> ExperimentConfig`."""
