"""Names and layouts of Hugging Face checkpoints, read in both directions; one file per family."""
