"""Flax NNX modules of DeepSeek-class language models: no I/O, no flags, no logging."""
