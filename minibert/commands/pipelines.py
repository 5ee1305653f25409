"""How commands open a pipeline: with the options that they share."""

from __future__ import annotations

from typing import Any

from minibert.pipelines import PRETRAINED, Pipeline, pipeline
from minibert.terminal import Arguments, chosen_model, shows_progress


def opened(task: str, arguments: Arguments, **options: Any) -> Pipeline:
    """The task's pipeline on the model asked for; the bundled one stands in where no fine-tuning is needed."""
    return pipeline(
        task,
        chosen_model(arguments) if task in PRETRAINED else arguments.model,
        revision=arguments.revision,
        device=arguments.device,
        dtype=arguments.dtype,
        batch_size=getattr(arguments, "batch_size", None),
        progress=shows_progress(arguments),
        **options,
    )
