"""What happens inside a BERT, step by step, with proof: nothing in `model.py` knows of it."""

from minibert.study.exercises import EXERCISES, check
from minibert.study.probe import Lens, attribute, lens, patch, zero_head
from minibert.study.steps import Name, google_variable, names
from minibert.study.trace import Source, Step, Trace, source_of, trace
from minibert.study.twin import proof, twin, ulps

__all__ = [
    "EXERCISES",
    "Lens",
    "Name",
    "Source",
    "Step",
    "Trace",
    "attribute",
    "check",
    "google_variable",
    "lens",
    "names",
    "patch",
    "proof",
    "source_of",
    "trace",
    "twin",
    "ulps",
    "zero_head",
]
