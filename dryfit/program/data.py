"""Data that isn't at hand: made up in the size that was asked for, in the place of files and data sets of the Hub."""

from __future__ import annotations

import builtins
import errno
import io
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from dryfit.engine.importing import Places

ROWS = 64  # of a data set that is made up, at least: some loaders drop the last batch
# The columns of a data set, by words of its name: preferences, talks, instructions, sentences that belong to a class.
_COLUMNS = (
    ("feedback|preference|dpo|orpo|rlhf|binarized|reward", ("prompt", "chosen", "rejected")),
    ("chat|capybara|oasst|messages|conversation|tulu", ("messages",)),
    ("alpaca|dolly|instruct", ("instruction", "input", "output")),
    ("gsm|math|question", ("question", "answer")),
    ("glue|mrpc|qqp|rte", ("sentence1", "sentence2", "label")),
    ("imdb|sst|cola|emotion|classif", ("text", "label")),
    ("", ("text",)),
)
_WORDS = "the quick brown fox jumps over the lazy dog and runs away from it "  # 14 words, about as many tokens


class MadeUpData:
    """What stands in for a program's data.

    ``batch``: rows and tokens of a batch; None: nothing is made up, and a program whose data is missing fails.
    """

    def __init__(self, batch: tuple[int, int] | None) -> None:
        self._batch = batch
        self.made_up: list[str] = []  # what was: names of files and data sets

    def patches(self) -> list[tuple[Any, str, Any]]:
        """Patches for the time of the program: none where nothing is made up."""
        return self._files() if self._batch else []

    def when_imported(self) -> dict[str, Places]:
        """By module, what gives its patches when it is imported; none where nothing is made up."""
        if not self._batch:
            return {}
        return {
            "transformers.models.auto.tokenization_auto": self._of_tokenizers,
            "datasets.load": self._of_datasets,
            "evaluate.loading": self._of_metrics,
            "tiktoken.registry": self._of_tiktoken,
        }

    def _tokens(self) -> int:
        rows, tokens = self._batch
        return 16 * rows * (tokens + 1)

    def _text(self) -> str:
        return _WORDS * (self._batch[1] // 12 + 1)

    def _files(self) -> list[tuple[Any, str, Any]]:
        """Arrays of token ids in files that are not there."""
        mapped, read, opened = np.memmap, np.fromfile, builtins.open

        def missing(file: Any) -> bool:
            named = isinstance(file, (str, os.PathLike))
            if named and not Path(file).exists():
                self.made_up.append(str(file))
                return True
            return False

        def memmap(
            file: Any, dtype: Any = np.uint8, mode: str = "r+", *args: Any, **options: Any
        ) -> Any:
            if mode in ("r", "c") and missing(file):
                return np.zeros(self._tokens(), dtype=dtype)
            return mapped(file, dtype, mode, *args, **options)

        def fromfile(file: Any, dtype: Any = float, *args: Any, **options: Any) -> Any:
            return (
                np.zeros(self._tokens(), dtype=dtype)
                if missing(file)
                else read(file, dtype, *args, **options)
            )

        def open_text(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            try:
                return opened(file, mode, *args, **options)
            except OSError as error:
                if (
                    error.errno != errno.ENOENT
                    or "b" in mode
                    or Path(str(file)).suffix != ".txt"
                    or not missing(file)
                ):
                    raise
            return io.StringIO((self._text() + "\n") * ROWS)

        return [(np, "memmap", memmap), (np, "fromfile", fromfile), (builtins, "open", open_text)]

    def _of_datasets(self, module: Any) -> list[tuple[Any, str, Any]]:
        """Patches of ``datasets.load``: data sets that can't be loaded here."""
        load = module.load_dataset

        def load_dataset(
            path: str, name: Any = None, *args: Any, split: Any = None, **options: Any
        ) -> Any:
            try:
                return load(path, name, *args, split=split, **options)
            except Exception:
                self.made_up.append(f"{path} {name or ''}".strip())
                return self._data_set(
                    f"{path} {name or ''}", split, streamed=bool(options.get("streaming"))
                )

        return [(module, "load_dataset", load_dataset)]

    def _of_metrics(self, module: Any) -> list[tuple[Any, str, Any]]:
        """Patches of ``evaluate.loading``: scripts of metrics, which come from the Hub."""
        load = module.load

        def loaded(path: str, *args: Any, **options: Any) -> Any:
            try:
                return load(path, *args, **options)
            except Exception:
                self.made_up.append(f"the metric {path}")
                return SimpleNamespace(
                    compute=lambda *_, **__: {path: 0.0}, add_batch=lambda *_, **__: None
                )

        return [(module, "load", loaded)]

    def _of_tokenizers(self, module: Any) -> list[tuple[Any, str, Any]]:
        """Patches of ``transformers.models.auto.tokenization_auto``: one token a byte, in a model's vocabulary."""
        kind = module.AutoTokenizer
        load = kind.from_pretrained.__func__

        def from_pretrained(cls: Any, name: Any, *args: Any, **options: Any) -> Any:
            try:
                loaded = load(cls, name, *args, **options)
            except Exception:
                loaded = ()
            if len(loaded) >= 256:  # of a folder without its files transformers makes an empty one
                return loaded
            self.made_up.append(f"the tokenizer of {Path(name).name}")
            return _byte_tokenizer(_vocabulary(name))

        return [(kind, "from_pretrained", classmethod(from_pretrained))]

    def _of_tiktoken(self, module: Any) -> list[tuple[Any, str, Any]]:
        """Patches of ``tiktoken.registry``: the same with the special token of GPT-2 at its place."""
        load = module.get_encoding

        def get_encoding(name: str) -> Any:
            try:
                return load(name)
            except Exception:
                from tiktoken import Encoding

                self.made_up.append(f"the encoding {name}")
                ranks = {bytes([value]): value for value in range(256)}
                special = {"<|endoftext|>": 50256}
                return Encoding(
                    name, pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens=special
                )

        return [(module, "get_encoding", get_encoding)]

    def _data_set(self, name: str, split: Any, streamed: bool) -> Any:
        """Rows in the columns that data sets of such a name have (:data:`_COLUMNS`)."""
        from datasets import ClassLabel, Dataset, DatasetDict, IterableDatasetDict

        rows = max(ROWS, 8 * self._batch[0])
        columns = next(
            columns for words, columns in _COLUMNS if re.search(words, name, re.IGNORECASE)
        )
        made = Dataset.from_dict({column: [self._value(column)] * rows for column in columns})
        if "label" in columns:
            made = made.cast_column("label", ClassLabel(names=["no", "yes"]))
        self.made_up[-1] += f" ({', '.join(columns)})"
        made = made.to_iterable_dataset() if streamed else made
        parts = IterableDatasetDict if streamed else DatasetDict
        return (
            made if split is not None else parts({"train": made, "validation": made, "test": made})
        )

    def _value(self, column: str) -> Any:
        short = {
            "label": 0,
            "prompt": "Why? ",
            "instruction": "Why?",
            "question": "Why?",
            "input": "",
        }
        if column == "messages":
            question = {"role": "user", "content": "Why?"}
            return [question, {"role": "assistant", "content": self._text()}]
        return short.get(column, self._text())


_CHAT = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


def _vocabulary(name: Any) -> int:
    """The size of a model's vocabulary; scripts give a model the vocabulary of its tokenizer."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name).get_text_config().vocab_size
    except Exception:
        return 0


def _byte_tokenizer(size: int) -> Any:
    """A tokenizer of transformers with a token for each byte and marks, and others that no text has, up to a size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    marks = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = marks | {letter: len(marks) + at for at, letter in enumerate(letters)}
    vocabulary |= {f"<{at}>": at for at in range(len(vocabulary), size)}
    made = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=_CHAT, **names)
