"""Is the fine-tuned encoder better than something simple? Three small tasks built from real text, several seeds.

halves: half of a sentence is given, without capitals and punctuation; is it the first half or the second? Words alone
say something about it, their order says more. Sentences to learn from are of the corpus, others of its validation part.

questions: two sentences of the encyclopedia about two people; when was one of them born, when did they die, what were
they? A quarter of the questions is about somebody else and has no answer. Learnt from some people, tested on others.

definitions: which words does a definition define, among all those of the test? Learnt from the corpus's dictionary
entries, tested on those of its validation part, by the vectors' cosines.

Some of the examples held out choose the epoch, the rest are the test. All contenders see the same examples.

    python benchmarks/finetune.py [--task halves questions definitions] [--model NAME] [--corpus DIR] [--seeds 3]
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import common
import finetune_data as data
import numpy as np
import torch
from finetune_data import Example
from torch import Tensor, nn

from minibert import SentenceEncoder, cli
from minibert.finetuning.answers import answer_scores
from minibert.finetuning.scores import ranking_scores
from minibert.pipelines import pipeline
from minibert.weights import hub

DEFAULTS = {"halves": (3000, 3e-4), "questions": (600, 5e-4), "definitions": (2500, 5e-4)}  # examples, learning rate
Found = dict[str, dict[str, list[float]]]  # contender -> score -> one value a seed


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


def _shape(what: str, train: list[Any], validation: list[Any], test: list[Any]) -> str:
    return f"{len(train)} {what} to learn from, {len(validation)} to choose by, {len(test)} to test on"


def write_table(path: Path, header: Example, examples: list[Example]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *examples])
    return path


def finetuned(
    task: str,
    files: dict[str, Path],
    arguments: argparse.Namespace,
    score: Callable[[Path], dict[str, float]],
    options: list[str],
) -> dict[str, list[float]]:
    """The scores of what `minibert finetune` writes, the model of its best epoch, for each seed."""
    found: dict[str, list[float]] = {}
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        with tempfile.TemporaryDirectory() as folder:
            output = Path(arguments.keep or folder) / f"{task}-{arguments.train}-seed-{seed}"
            given = {"task": task, "model": arguments.model, "output": output, "seed": seed, **files}
            given |= {"epochs": arguments.epochs, "learning-rate": arguments.learning_rate}
            if cli.main(["finetune", *(part for n, v in given.items() for part in (f"--{n}", str(v))), *options]):
                raise RuntimeError("minibert finetune failed")
            scores = score(output / "model")
            print(f"{task}, seed {seed}: {scores}", flush=True)
            for name, value in scores.items():
                found.setdefault(name, []).append(value)
    return found


# Halves


def halves(arguments: argparse.Namespace, folder: Path) -> tuple[str, Found]:
    train = data.halves(arguments.corpus / "train.txt.xz", arguments.train, 0)
    held_out = data.halves(arguments.corpus / "validation.txt.xz", 3000, 1)
    validation, test = held_out[:1000], held_out[1000:]
    files = {name: write_table(folder / f"{name}.csv", ("text", "label"), examples)
             for name, examples in (("train", train), ("validation", validation))}  # fmt: skip

    def score(model: Path) -> dict[str, float]:
        answers = pipeline("text-classification", model)([text for text, _ in test])
        right = [answer["label"] == label for answer, (_, label) in zip(answers, test, strict=True)]
        return {"accuracy": mean(right)}

    return _shape("halves of sentences", train, validation, test), {
        "majority": {"accuracy": [max(Counter(label for _, label in test).values()) / len(test)]},
        "bag of words": {"accuracy": [bag_of_words(train, validation, test, 1)]},
        "bag of words and pairs": {"accuracy": [bag_of_words(train, validation, test, 2)]},
        "minibert finetune": finetuned("classification", files, arguments, score, []),
    }


# Questions


def questions(arguments: argparse.Namespace, folder: Path) -> tuple[str, Found]:
    persons = data.people(arguments.corpus / "train.txt.xz")
    kept = len(persons) * 3 // 4
    train = data.questions(persons[:kept], arguments.train, 0)
    held_out = data.questions(persons[kept:], 400, 1)
    validation, test = held_out[:100], held_out[100:]
    files = {name: data.write_json_lines(folder / f"{name}.jsonl", examples)
             for name, examples in (("train", train), ("validation", validation))}  # fmt: skip
    right = [[answer["text"] for answer in each["answers"]] for each in test]

    def score(model: Path) -> dict[str, float]:
        ask = pipeline("question-answering", model, handle_impossible_answer=True)
        asked = [{"question": each["question"], "context": each["context"]} for each in test]
        metrics = [json.loads(line) for line in (model.parent / "metrics.jsonl").read_text().splitlines()]
        best = max(metrics, key=lambda epoch: epoch["f1"])  # the epoch whose model this is
        plain, chosen = ask(asked), ask(asked, null_score_diff_threshold=best["best_f1_thresh"])
        scores, others = (answer_scores([each["answer"] for each in some], right) for some in (plain, chosen))
        return scores | {f"{name} with best_f1_thresh": value for name, value in others.items()}

    def listed(scores: dict[str, float]) -> dict[str, list[float]]:
        return {name: [value] for name, value in scores.items()}

    return _shape("questions", train, validation, test), {
        "never an answer": listed(answer_scores([""] * len(test), right)),
        "first year of the passage": listed(answer_scores([_first_year(each["context"]) for each in test], right)),
        "first year of the sentence most alike": listed(answer_scores([_overlap(each) for each in test], right)),
        "minibert finetune": finetuned("question-answering", files, arguments, score, ["--batch-size", "16"]),
    }


def _first_year(text: str) -> str:
    return found[0] if (found := re.search(r"\d{4}", text)) else ""


def _overlap(question: dict[str, Any]) -> str:
    """The first year in the sentence that has most words of the question; nothing where it has none but "was"."""
    asked = set(re.findall(r"\w+", question["question"].lower())) - {"when", "what", "was", "did", "born", "die"}
    sentences = re.split(r"(?<=\.) ", question["context"])
    best = max(sentences, key=lambda sentence: len(asked & set(re.findall(r"\w+", sentence.lower()))))
    return _first_year(best) if asked & set(re.findall(r"\w+", best.lower())) else ""


# Definitions


def definitions(arguments: argparse.Namespace, folder: Path) -> tuple[str, Found]:
    train = data.definitions(arguments.corpus / "train.txt.xz", arguments.train, 0)
    held_out = data.definitions(arguments.corpus / "validation.txt.xz", 1000, 1)
    validation, test = held_out[:300], held_out[300:]
    files = {name: write_table(folder / f"{name}.csv", ("text", "text_pair"), pairs)
             for name, pairs in (("train", train), ("validation", validation))}  # fmt: skip

    def score(model: Path | str) -> dict[str, float]:
        encoder = SentenceEncoder.from_pretrained(model)
        first, second = (encoder.encode([pair[side] for pair in test], normalize=True) for side in (0, 1))
        return ranking_scores(first @ second.T, np.eye(len(test), dtype=bool))

    def listed(scores: dict[str, float]) -> dict[str, list[float]]:
        return {name: [value] for name, value in scores.items()}

    return _shape("definitions", train, validation, test), {
        "words in common (tf-idf)": listed(tf_idf(train, test, analyzer="word")),
        "letters in common (tf-idf)": listed(tf_idf(train, test, analyzer="char_wb", ngram_range=(3, 5))),
        "the model before, mean pooling": listed(score(arguments.model)),
        "minibert finetune": finetuned("sentence-pairs", files, arguments, score, ["--batch-size", "32"]),
    }


def tf_idf(train: list[Example], test: list[Example], **options: Any) -> dict[str, float]:
    """Cosines of tf-idf vectors, with the frequencies of all texts but the test's."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(sublinear_tf=True, **options).fit([text for pair in train for text in pair])
    first, second = (vectorizer.transform([pair[side] for pair in test]) for side in (0, 1))
    return ranking_scores((first @ second.T).toarray(), np.eye(len(test), dtype=bool))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = {"halves": halves, "questions": questions, "definitions": definitions}
    parser.add_argument("--task", nargs="+", choices=tasks, default=list(tasks))
    parser.add_argument("--model", default=hub.default_model(), help="a directory or a name on the Hub")
    parser.add_argument("--corpus", type=Path, default=Path(__file__).parents[2] / "shared" / "corpus")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--first-seed", type=int, default=0, help="the lowest of them: to add to those run before")
    parser.add_argument("--keep", type=Path, help="where the runs and their models stay; by default nowhere")
    parser.add_argument("--train", type=int, help="examples to learn from; by default as the results were made")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, help="the default is the task's")
    arguments = parser.parse_args()
    for task in arguments.task:
        count, rate = DEFAULTS[task]
        chosen = {"train": arguments.train or count, "learning_rate": arguments.learning_rate or rate}
        with tempfile.TemporaryDirectory() as folder:
            what, found = tasks[task](argparse.Namespace(**{**vars(arguments), **chosen}), Path(folder))
        report(what, found)


def report(shape: str, found: Found) -> None:
    """Print each score with its spread, and add it to the results."""
    table = []
    for contender, scores in found.items():
        for score, values in scores.items():
            spread = stdev(values) if len(values) > 1 else 0.0
            print(f"{contender:40} {score:24} {mean(values):8.4f} +- {spread:.4f}  {values}")
            table.append({**common.machine(), "benchmark": "finetune", "shape": shape, "contender": contender,
                          "seeds": len(values), "score": score, "mean": round(mean(values), 4),
                          "spread": round(spread, 4), "lowest": round(min(values), 4),
                          "highest": round(max(values), 4)})  # fmt: skip
    common.append(table, common.RESULTS / "finetune.csv")


if __name__ == "__main__":
    main()
