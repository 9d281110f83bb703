"""Sharding-free numeric ops, one folder per op; knows nothing of meshes or models."""
