"""Byte-level BPE: any Unicode text in, token ids out, and the same text back.

The merges are learned by the `tokenizers` library from the training stories. The 256 bytes are all
in the vocabulary, so nothing is ever unknown; id 0 is `<|endoftext|>`, which `encode_stories` puts
behind each story and which no text can spell: the same letters inside a story are ordinary text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from minigpt.core.files import parse_json, read_text, write_text
from minigpt.core.settings import UserError

END_OF_TEXT = "<|endoftext|>"  # the token, and what stands between the stories of text files
MIN_VOCAB_SIZE = 257  # the 256 bytes and END_OF_TEXT
MAX_VOCAB_SIZE = 65_536  # ids are stored in 16 bits

# The pre-tokenizer never looks across the space in front of a word, so a text may be cut there and
# its words encoded one by one. What Python calls whitespace includes all that the library does.
# Where all spaces are of that kind, as in nearly every story, `str.split` takes half the time.
_WORD_BOUNDARY = re.compile(r" (?=\S)")
_MAX_CACHED_WORDS = 100_000  # with the limit below, at most about 20 MB
_MAX_CACHED_LENGTH = 32  # characters: longer ones seldom come back


class Tokenizer:
    """Text to ids and back. Made by `Tokenizer.train` or `Tokenizer.load`."""

    end_of_text = 0

    def __init__(self, library: tokenizers.Tokenizer):
        self._library = library
        # Not stored in the JSON: whoever spells END_OF_TEXT in a story gets letters, not id 0.
        self._library.encode_special_tokens = True
        self._ids_of_word = _WordIds(self._library)

    @classmethod
    def train(cls, stories: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn the merges from `stories`, which are streamed and never held in memory.

        Stories with few different words may not give `vocab_size` tokens; the tokenizer is then
        smaller, and its `vocab_size` says by how much. The same stories give the same tokenizer.

        Raises:
            UserError: `vocab_size` out of range, or a story that is not valid Unicode.
        """
        check_vocab_size(vocab_size)
        library = _untrained()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        library.train_from_iterator(_checked(stories), trainer)
        return cls(library)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read what `save` wrote.

        Raises:
            UserError: no such file, not a tokenizer, or a tokenizer of another kind.
        """
        try:
            text = read_text(Path(path))
            if max(parse_json(text)["model"]["vocab"].values()) >= MAX_VOCAB_SIZE:
                raise ValueError("an id that the library would make gigabytes of room for")
            library = tokenizers.Tokenizer.from_str(text)
        except OSError as error:
            raise UserError(f"cannot read the tokenizer {path}: {error.strerror}") from None
        except Exception:  # the library raises bare Exception for what it cannot parse
            problem = f"{path} is not a tokenizer.json; take the one of a run folder"
            raise UserError(problem) from None
        if not _is_ours(library):
            expected = f"a byte-level BPE with {END_OF_TEXT} as token 0"
            raise UserError(f"{path} is a tokenizer of another kind; expected {expected}")
        return cls(library)

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json, whole or not at all."""
        write_text(Path(path), self.to_json())

    def to_json(self) -> str:
        """What `save` writes: the format of the `tokenizers` library."""
        return self._library.to_str(pretty=True)

    @property
    def vocab_size(self) -> int:
        """How many ids there are, END_OF_TEXT included."""
        return self._library.get_vocab_size()

    @property
    def fingerprint(self) -> str:
        """A hash of the vocabulary and the merges: equal fingerprints, equal ids."""
        return hashlib.blake2b(self._library.to_str().encode(), digest_size=16).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without END_OF_TEXT. UserError for a text with lone surrogates."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, on all cores. UserError for a text with lone surrogates."""
        return [encoding.ids for encoding in self._library.encode_batch_fast(list(_checked(texts)))]

    def encode_stories(self, stories: Iterable[str]) -> np.ndarray:
        """The ids of all stories in one row, END_OF_TEXT behind each: [n_tokens] uint16.

        The same ids as `encode_batch`, but a word goes through the library when it is first met,
        and is looked up from then on, unless it is a long one.
        """
        ids_of, end = self._ids_of_word.__getitem__, _stored([self.end_of_text])
        pieces: list[bytes] = []
        for story in _checked(stories):
            words = story.split(" ")
            words[0] = " " + words[0]
            try:
                ids = b"".join(map(ids_of, words))
            except KeyError:  # a space that ends no word, or does not begin the next one
                first, *rest = _WORD_BOUNDARY.split(story)
                ids = b"".join(map(ids_of, [" " + first, *rest]))
            pieces += (ids, end)
        return np.frombuffer(b"".join(pieces), dtype="<u2")

    def decode(self, ids: Sequence[int]) -> str:
        r"""The text of `ids`; bytes that are not yet a whole character come out as `\ufffd`."""
        return self._library.decode(list(ids), skip_special_tokens=False)

    def token(self, id: int) -> str:
        """The text of one token with its leading space, such as " dad"."""
        return self.decode([id])


class _WordIds(dict[str, bytes]):
    """uint16 ids of "word" as it stands after a space; of " word" for one that begins a story.

    Words come in when they are first asked for. Nothing, and what begins with white space, is no
    word after a space: KeyError.
    """

    def __init__(self, library: tokenizers.Tokenizer) -> None:
        super().__init__()
        self._library = library

    def __missing__(self, word: str) -> bytes:
        if word.startswith(" "):
            text = word[1:]
        elif word and not word[0].isspace():
            text = " " + word
        else:
            raise KeyError(word)
        ids = _stored(self._library.encode(text).ids)
        if len(word) <= _MAX_CACHED_LENGTH:
            if len(self) >= _MAX_CACHED_WORDS:
                self.clear()
            self[word] = ids
        return ids


def _stored(ids: list[int]) -> bytes:
    return np.array(ids, dtype="<u2").tobytes()


def check_vocab_size(vocab_size: int) -> None:
    """Raises UserError unless MIN_VOCAB_SIZE <= `vocab_size` <= MAX_VOCAB_SIZE."""
    if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        limits = f"choose from {MIN_VOCAB_SIZE} (all bytes and {END_OF_TEXT}) to {MAX_VOCAB_SIZE}"
        raise UserError(limits, "vocab_size", vocab_size, fix={"vocab_size": 3000})


def utf8_length(text: str) -> int:
    """How many bytes `text` takes in UTF-8.

    Raises:
        UserError: `text` holds half of a surrogate pair, as a broken JSON escape leaves behind.
    """
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        near = text[max(0, error.start - 20) : error.end + 20]
        problem = f"the text holds half of a surrogate pair, which is not a character, in {near!a}"
        raise UserError(f"{problem}; remove it or write the whole character") from None


def _checked(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        utf8_length(text)
        yield text


def _untrained() -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    return library


def _is_ours(library: tokenizers.Tokenizer) -> bool:
    """Whether `library` is what `Tokenizer.train` makes, whatever its words and merges."""
    expected, vocabulary = _untrained(), library.get_vocab()
    expected.add_special_tokens([END_OF_TEXT])
    return (
        _settings(library) == _settings(expected)
        and vocabulary.keys() >= {END_OF_TEXT, *pre_tokenizers.ByteLevel.alphabet()}
        and sorted(vocabulary.values()) == list(range(len(vocabulary)))
        and len(vocabulary) <= MAX_VOCAB_SIZE
    )


def _settings(library: tokenizers.Tokenizer) -> dict[str, Any]:
    settings = json.loads(library.to_str())
    del settings["model"]["vocab"], settings["model"]["merges"]
    return settings
