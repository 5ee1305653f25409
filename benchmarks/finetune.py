"""Is a fine-tuned encoder better than a bag of words? A small task built from real text, several seeds.

The task: half of a sentence is given, without capitals and punctuation; is it the first half or the second? Words alone
say something about it, their order says more. Sentences to learn from are of the corpus, others of its validation part:
some choose the epoch, or the strength of weight decay, the rest are the test. All contenders see the same examples.

    python benchmarks/finetune.py [--model NAME] [--corpus ../shared/corpus] [--seeds 3]
"""

from __future__ import annotations

import argparse
import csv
import lzma
import random
import re
import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev

import common
import torch
from torch import Tensor, nn

from minibert import cli
from minibert.pipelines import pipeline
from minibert.weights import hub

Example = tuple[str, str]  # text, label
WORDS = (12, 40)  # of a sentence
LINES = 200_000  # of a part of the corpus to choose from


def halves(path: Path, count: int, seed: int) -> list[Example]:
    """One half each of `count` sentences of a corpus file, as many first as second halves."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        lines = [line for _, line in zip(range(LINES), file, strict=False)]
    draw = random.Random(seed)
    draw.shuffle(lines)
    examples: list[Example] = []
    for line in lines:
        words = re.findall(r"[a-z']+", line.lower())
        if line.strip().endswith(".") and WORDS[0] <= len(words) <= WORDS[1]:
            first = len(examples) % 2 == 0
            half = words[: len(words) // 2] if first else words[len(words) // 2 :]
            examples.append((" ".join(half), "first" if first else "second"))
        if len(examples) == count:
            return examples
    raise ValueError(f"{path} has {len(examples)} suitable sentences in its first {LINES} lines, not {count}")


def features(text: str, longest: int) -> set[str]:
    """The words of a text, and with longest=2 its pairs of neighbours."""
    words = text.split()
    return set(words) | ({" ".join(pair) for pair in pairwise(words)} if longest == 2 else set())


def bag_of_words(train: list[Example], validation: list[Example], test: list[Example], longest: int) -> float:
    """Accuracy of a logistic regression on the presence of words; validation chooses the strength of weight decay."""
    counts = Counter(feature for text, _ in train for feature in features(text, longest))
    columns = {feature: i for i, feature in enumerate(f for f, n in counts.items() if n > 1)}

    def matrix(examples: list[Example]) -> tuple[Tensor, Tensor]:
        x = torch.zeros(len(examples), len(columns))
        for row, (text, _) in enumerate(examples):
            x[row, [columns[f] for f in features(text, longest) if f in columns]] = 1
        return x, torch.tensor([float(label == "second") for _, label in examples])

    (x, y), held_out = matrix(train), (matrix(validation), matrix(test))
    best = (0.0, 0.0)
    for decay in (1e-4, 1e-3, 1e-2):
        model = nn.Linear(len(columns), 1)
        nn.init.zeros_(model.weight)
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=100, line_search_fn="strong_wolfe")

        def loss(model: nn.Linear = model, optimizer: torch.optim.LBFGS = optimizer, decay: float = decay) -> Tensor:
            optimizer.zero_grad()
            value = nn.functional.binary_cross_entropy_with_logits(model(x).squeeze(1), y)
            value = value + decay * model.weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        best = max(best, tuple(float(((model(a).squeeze(1) > 0) == b.bool()).float().mean()) for a, b in held_out))
    return best[1]


def finetuned(
    model: str, train: list[Example], validation: list[Example], test: list[Example], options: list[str]
) -> float:
    """Accuracy of what `minibert finetune` writes: the model of its best epoch."""
    with tempfile.TemporaryDirectory() as folder:
        for name, examples in (("train", train), ("validation", validation)):
            with open(f"{folder}/{name}.csv", "w", newline="") as file:
                csv.writer(file).writerows([("text", "label"), *examples])
        files = ["--train", f"{folder}/train.csv", "--validation", f"{folder}/validation.csv"]
        command = ["finetune", "--task", "classification", *files, "--model", model, "--output", f"{folder}/run"]
        if cli.main([*command, *options]):
            raise RuntimeError("minibert finetune failed")
        answers = pipeline("text-classification", f"{folder}/run/model")([text for text, _ in test])
    return mean(answer["label"] == label for answer, (_, label) in zip(answers, test, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a directory or a name on the Hub; default: the bundled model")
    parser.add_argument("--corpus", type=Path, default=Path(__file__).parents[2] / "shared" / "corpus")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", type=int, default=3000, help="examples")
    parser.add_argument("--validation", type=int, default=1000, help="examples")
    parser.add_argument("--test", type=int, default=2000, help="examples")
    parser.add_argument("--epochs", default="3")
    parser.add_argument("--learning-rate", default="3e-4")
    arguments = parser.parse_args()
    train = halves(arguments.corpus / "train.txt.xz", arguments.train, 0)
    held_out = halves(arguments.corpus / "validation.txt.xz", arguments.validation + arguments.test, 1)
    validation, test = held_out[: arguments.validation], held_out[arguments.validation :]
    options = ["--epochs", arguments.epochs, "--learning-rate", arguments.learning_rate]
    found = {
        "majority": [max(Counter(label for _, label in test).values()) / len(test)],
        "bag of words": [bag_of_words(train, validation, test, 1)],
        "bag of words and pairs": [bag_of_words(train, validation, test, 2)],
        "minibert finetune": [
            finetuned(arguments.model or hub.default_model(), train, validation, test, [*options, "--seed", str(seed)])
            for seed in range(arguments.seeds)
        ],
    }
    shape = f"{len(train)} halves of sentences to learn from, {len(validation)} to choose by, {len(test)} to test on"
    table = []
    for name, accuracies in found.items():
        spread = stdev(accuracies) if len(accuracies) > 1 else 0.0
        print(f"{name:24} {mean(accuracies):.4f} +- {spread:.4f}  {accuracies}")
        table.append({**common.machine(), "benchmark": "finetune", "shape": shape, "contender": name,
                      "seeds": len(accuracies), "accuracy": round(mean(accuracies), 4), "spread": round(spread, 4),
                      "lowest": round(min(accuracies), 4), "highest": round(max(accuracies), 4)})  # fmt: skip
    common.append(table, common.RESULTS / "finetune.csv")


if __name__ == "__main__":
    main()
