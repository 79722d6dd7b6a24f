"""Programs to run with torchrun, and to start one's own from."""
