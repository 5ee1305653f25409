"""Pretraining with MLM and NSP: `texts`, `vocabulary` and `corpus` (text to token ids on disk), `pairs`, `order` and
`batches` (sentence pairs, their order, masks), `loss` and `loop` (schedule, validation), `prepare` and `command`.
"""
