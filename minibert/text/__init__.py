"""Text to tensors: `tokenizer` (the call that users make), `wordpiece` (the algorithm), `encoding` (what comes out)."""
