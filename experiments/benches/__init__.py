"""What `python -m experiments.bench` can measure, one file each."""
