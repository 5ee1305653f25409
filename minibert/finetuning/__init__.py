"""Fine-tuning of a task head: `examples` (labelled files), `tasks`, `scores` and `loop` (epochs, the best one kept)."""
