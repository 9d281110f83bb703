"""A train step compiled for devices that are not there, and what can be read off it."""
