"""Tokenizers in threads, in forked processes and in a DataLoader's workers: nothing hangs, nothing is disturbed."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from tokenizers import Tokenizer
from torch.utils.data import DataLoader

from minibert import BertTokenizer

TEXTS = ["Unbelievable words in a text of some length. " * k for k in (1, 30)]
OPTIONS = {"truncation": True, "max_length": 16, "padding": True, "return_tensors": "pt"}
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


@pytest.fixture(scope="module")
def tokenizer(minilm_dir) -> BertTokenizer:
    return BertTokenizer.from_pretrained(minilm_dir)


def finished(child: int, seconds: float = 60) -> int | None:
    """The exit status of a child; None, and the child is killed, if it is not there in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return None


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_children_forked_while_a_thread_tokenizes_finish(tokenizer):
    expected = tokenizer(TEXTS, **OPTIONS)["input_ids"].tolist()
    stop = threading.Event()

    def tokenize() -> None:
        while not stop.is_set():
            tokenizer(TEXTS * 4, **OPTIONS)
            tokenizer(TEXTS, return_offsets_mapping=True)

    with ThreadPoolExecutor(2) as threads:
        for _ in range(2):
            threads.submit(tokenize)
        try:
            statuses = []
            for _ in range(15):
                child = os.fork()
                if child == 0:
                    right = tokenizer(TEXTS, **OPTIONS)["input_ids"].tolist() == expected
                    os._exit(0 if right and tokenizer.decode(expected[0]) else 1)
                statuses.append(finished(child))
        finally:
            stop.set()
    assert statuses == [0] * 15


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_of_a_data_loader_tokenize(tokenizer):
    tokenizer(TEXTS, **OPTIONS)  # the parent has used it
    loader = DataLoader(TEXTS * 4, batch_size=2, num_workers=2, timeout=60, multiprocessing_context="fork",
                        collate_fn=lambda texts: tokenizer(texts, **OPTIONS))  # fmt: skip
    assert [batch["input_ids"].shape for batch in loader] == [(2, 16)] * 4


def test_no_call_changes_the_backend(tokenizer, monkeypatch):
    """Older releases of `tokenizers` raise "Already borrowed" when one thread changes what another reads."""
    backend, before = tokenizer.backend_tokenizer, tokenizer.backend_tokenizer.to_str()
    changed = []
    for name in ("enable_truncation", "no_truncation", "enable_padding", "no_padding", "add_tokens"):
        plain = getattr(Tokenizer, name)
        monkeypatch.setattr(
            Tokenizer,
            name,
            lambda self, *arguments, _plain=plain, **options: (
                changed.append(self is backend) or _plain(self, *arguments, **options)
            ),
        )
    tokenizer(TEXTS, **OPTIONS)
    tokenizer(TEXTS, split_special_tokens=True)
    tokenizer(TEXTS[1], max_length=9, stride=2, truncation=True, return_overflowing_tokens=True)
    assert tokenizer(TEXTS).word_ids(1)
    assert changed
    assert not any(changed)
    assert tokenizer.backend_tokenizer is backend
    assert backend.to_str() == before


def test_a_cut_set_by_hand_does_not_leak_into_calls(minilm_dir):
    tokenizer = BertTokenizer.from_pretrained(minilm_dir)
    plain = tokenizer(TEXTS)["input_ids"]
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=99)
    assert tokenizer(TEXTS)["input_ids"] == plain


def test_threads_that_encode_and_decode_at_once(tokenizer):
    expected = tokenizer(TEXTS, **OPTIONS)["input_ids"].tolist()
    text = tokenizer.decode(expected[1])

    def encode(_: int) -> bool:
        return tokenizer(TEXTS, **OPTIONS)["input_ids"].tolist() == expected

    def decode(_: int) -> bool:
        return tokenizer.decode(expected[1]) == text

    with ThreadPoolExecutor(6) as pool:
        jobs = [pool.submit(job, i) for i in range(100) for job in (encode, decode)]
        assert all(job.result() for job in jobs)
