"""What pretraining and fine-tuning share: `run` (a run's directory), `optimizer`, `distributed` (one process or many),
`onednn`, `curves`.
"""
