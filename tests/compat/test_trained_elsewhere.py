"""Our models under others' training: transformers' Trainer, PEFT, accelerate, and loops of plain torch.

Each run is made twice, on transformers' BERT and on ours, with the same weights, data and seeds; losses and weights at
the end are the same, dropout included.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from reference import TINY, assert_as_exact, twins
from torch import nn
from torch.utils.data import DataLoader

import minibert

STEPS = 6
SIZES = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "num_labels": 3}


def examples(count: int = 24) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(5)
    rows = []
    for number in range(count):
        length = int(torch.randint(4, 20, (), generator=generator))
        ids = torch.randint(5, TINY["vocab_size"], (20,), generator=generator)
        ids[length:] = 0
        mask = torch.arange(20) < length
        rows.append({"input_ids": ids, "attention_mask": mask.long(), "labels": number % 3})
    return rows


def pair() -> tuple[nn.Module, nn.Module]:
    return twins("BertForSequenceClassification", **SIZES)


def equal_weights(reference: nn.Module, ours: nn.Module) -> bool:
    theirs = reference.state_dict()
    return theirs.keys() == ours.state_dict().keys() and all(
        torch.equal(value, theirs[name]) for name, value in ours.state_dict().items()
    )


# transformers.Trainer


def trainer(model: nn.Module, directory: Path, **options: Any) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(
        output_dir=str(directory),
        use_cpu=True,
        per_device_train_batch_size=4,
        max_steps=STEPS,
        learning_rate=1e-3,
        logging_steps=1,
        save_steps=STEPS // 2,
        report_to=[],
        disable_tqdm=True,
        seed=11,
        **options,
    )
    return transformers.Trainer(model=model, args=arguments, train_dataset=examples(), eval_dataset=examples(8))


def losses(run: transformers.Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def test_a_trainer_run(tmp_path):
    """Trained, evaluated, saved, resumed from the middle, and opened again by either library."""
    reference, ours = pair()
    runs, results = [], []
    for name, model in (("theirs", reference), ("ours", ours)):
        runs.append(trainer(model, tmp_path / name))  # which sets the seed
        results.append(runs[-1].train())
    assert results[0].training_loss == results[1].training_loss
    assert losses(runs[0]) == losses(runs[1])
    assert len(losses(runs[1])) == STEPS
    assert equal_weights(reference, ours)
    assert runs[0].evaluate()["eval_loss"] == runs[1].evaluate()["eval_loss"]
    predictions = [run.predict(examples(8)).predictions for run in runs]
    assert (predictions[0] == predictions[1]).all()

    # Trainer.save_model writes the weights alone of a model that is not transformers' own
    runs[1].model.save_pretrained(tmp_path / "saved")
    for library in (transformers, minibert):
        saved = library.BertForSequenceClassification.from_pretrained(tmp_path / "saved")
        assert equal_weights(reference, saved)

    resumed = trainer(pair()[1], tmp_path / "ours")
    resumed.train(resume_from_checkpoint=str(tmp_path / "ours" / f"checkpoint-{STEPS // 2}"))
    assert resumed.state.global_step == STEPS
    assert equal_weights(reference, resumed.model)


def test_a_trainer_run_with_gradient_checkpointing(tmp_path):
    reference, ours = pair()
    for name, model in (("theirs", reference), ("ours", ours)):
        trainer(model, tmp_path / name, gradient_checkpointing=True).train()
    assert equal_weights(reference, ours)


class TakesAnything(minibert.BertForSequenceClassification):
    def forward(self, input_ids=None, attention_mask=None, labels=None, **options):
        return super().forward(input_ids, attention_mask, labels=labels, **options)


@pytest.mark.parametrize("kind", [minibert.BertForSequenceClassification, TakesAnything])
def test_accumulated_gradients_are_a_mean(tmp_path, kind):
    """As a batch of all of them gives it. Of transformers' BERT, Trainer takes the sum: see docs/differences.md.

    In float64, so that no rounding hides a slip.
    """
    results = []
    for steps in (1, 2):
        model = pair()[1].double().eval()
        model.__class__ = kind
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        run = trainer(model, tmp_path / str(steps), gradient_accumulation_steps=steps, lr_scheduler_type="constant",
                      train_sampling_strategy="sequential", optim="sgd")  # fmt: skip
        run.args.per_device_train_batch_size, run._train_batch_size = 8 // steps, 8 // steps
        run.train()
        results.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(results[1], results[0])


def test_checkpointing_of_some_layers_is_refused():
    _, ours = pair()
    for options in ({"every_n_layers": 2}, {"offload": True}):
        with pytest.raises(ValueError, match=next(iter(options))):
            ours.gradient_checkpointing_enable(**options)
    assert not ours.is_gradient_checkpointing


def test_masked_words_by_the_data_collator(tmp_path, minilm_dir):
    """DataCollatorForLanguageModeling with our tokenizer masks what it masks with transformers'."""
    texts = ["The bank is closed today.", "She sat on the bank of the river.", "Wolves", "It was dark."] * 3
    batches = []
    for library in (transformers, minibert):
        tokenizer = library.BertTokenizer.from_pretrained(minilm_dir)
        collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3, seed=3)
        batches.append(collate([tokenizer(text, return_special_tokens_mask=True) for text in texts]))
    assert batches[0].keys() == batches[1].keys()
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])
    reference, ours = twins("BertForMaskedLM", vocab_size=30522)
    results = [model(**batches[1]).loss for model in (reference, ours)]
    assert torch.equal(*results)


# PEFT


@pytest.mark.parametrize("kind", ["lora", "in place"])
def test_a_lora_run(tmp_path, kind):
    """Trained, saved, loaded onto a fresh model, merged."""
    models, ends = pair(), []
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_dropout=0.1, target_modules=["query", "value"])
    for name, model in zip(("theirs", "ours"), models, strict=True):
        torch.manual_seed(7)
        adapted = peft.get_peft_model(model, config) if kind == "lora" else peft.inject_adapter_in_model(config, model)
        end = torch_run(adapted)
        ends.append(end)
        if kind == "lora":
            adapted.save_pretrained(tmp_path / name)
    assert ends[0] == ends[1]
    if kind == "in place":
        return
    fresh = pair()
    outputs = []
    inputs = {name: torch.stack([row[name] for row in examples(8)]) for name in ("input_ids", "attention_mask")}
    for name, model in zip(("theirs", "ours"), fresh, strict=True):
        loaded = peft.PeftModel.from_pretrained(model, tmp_path / name).eval()
        with torch.no_grad():
            adapted = loaded(**inputs).logits
            exact = copy.deepcopy(loaded).double()(**inputs).logits
            merged = loaded.merge_and_unload().eval()
            assert_as_exact(merged(**inputs).logits, adapted, exact)  # sums of another order
        outputs.append(adapted)
    assert torch.equal(*outputs)
    assert type(merged) is minibert.BertForSequenceClassification


# Plain torch, and accelerate


def torch_run(model: nn.Module, prepare: Any = None) -> list[float]:
    """Losses of a few steps with dropout, by AdamW and a schedule."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (STEPS + 1))
    loader = DataLoader(examples(), batch_size=4)
    backward = lambda loss: loss.backward()  # noqa: E731
    if prepare is not None:
        model, optimizer, loader, schedule = prepare.prepare(model, optimizer, loader, schedule)
        backward = prepare.backward
    found = []
    torch.manual_seed(13)
    for batch in loader:
        loss = model(**batch).loss
        backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


def test_a_fine_tuning_by_plain_torch():
    reference, ours = pair()
    assert torch_run(reference) == torch_run(ours)
    assert equal_weights(reference, ours)


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_a_run_by_accelerate(mixed_precision):
    ends = []
    for model in pair():
        AcceleratorState._reset_state(reset_partial_state=True)  # kept for the process, also by a Trainer
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision=mixed_precision)
        ends.append(torch_run(model, accelerator))
        prepared = accelerator.prepare(model)
        row = examples(1)[0]
        assert prepared(row["input_ids"][None], row["attention_mask"][None]).logits.dtype == torch.float32
        accelerator.free_memory()
    assert ends[0] == ends[1]


# Loading data


@pytest.mark.parametrize("head", ["BertForMaskedLM", "BertForPreTraining"])
def test_a_model_made_empty_is_filled_by_accelerate(tmp_path, head):
    """`init_empty_weights` puts a parameter in the place of each name, which takes ties apart."""
    saved = twins(head)[1]
    saved.save_pretrained(tmp_path)
    with accelerate.init_empty_weights():
        model = getattr(minibert, head)(minibert.BertConfig(**TINY))
    model.tie_weights()
    filled = accelerate.load_checkpoint_and_dispatch(model, str(tmp_path / "model.safetensors"), device_map={"": "cpu"})
    predictions = filled.cls.predictions
    assert predictions.decoder.weight is filled.get_input_embeddings().weight
    assert predictions.decoder.bias is predictions.bias
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(filled.eval()(ids)[0], saved(ids)[0])


def test_batches_made_by_workers(minilm_dir):
    """The tokenizer in the processes of a DataLoader, after it was used in this one."""
    tokenizer = minibert.BertTokenizer.from_pretrained(minilm_dir)
    texts = [f"text number {i}" for i in range(12)]
    expected = tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
    loader = DataLoader(
        texts, batch_size=4, num_workers=2, collate_fn=lambda some: tokenizer(some, padding=True, return_tensors="pt")
    )
    found = [batch["input_ids"] for batch in loader]
    assert torch.equal(torch.cat(found), expected)


def test_batches_by_the_padding_collator(minilm_dir):
    tokenizer = minibert.BertTokenizer.from_pretrained(minilm_dir)
    collate = transformers.DataCollatorWithPadding(tokenizer)
    rows = [{**tokenizer("a text"), "label": 1}, {**tokenizer("another longer text"), "label": 0}]
    batch = collate(rows)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 5)
    assert batch["labels"].tolist() == [1, 0]
