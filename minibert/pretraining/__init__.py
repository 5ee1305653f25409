"""Pretraining with MLM and NSP: `corpus` (text to token ids on disk), `data` (sentence pairs, masking, batches),
`loss` and `loop` (schedule, checkpoints, validation)."""
