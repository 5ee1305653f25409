"""What pretraining and fine-tuning share: `distributed` (one process or many), `onednn`, `curves`."""
