"""What happens once per run: entry points and everything that touches disk, clock or screen."""
