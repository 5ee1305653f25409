"""What happens inside a BERT, step by step, with proof: nothing in `model.py` knows of it."""

from minibert.study.trace import Source, Step, Trace, source_of, trace

__all__ = ["Source", "Step", "Trace", "source_of", "trace"]
