"""Training on transformers' Trainer: exact resume, complete checkpoints, stages, signals."""
