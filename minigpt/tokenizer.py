"""Byte-level BPE tokenizer. It encodes any Unicode text, and decodes the ids to the same text.

The `tokenizers` library learns the merges from the training stories. The vocabulary contains all
256 bytes, so there are no unknown tokens. Id 0 is the token `<|endoftext|>`, which `encode_stories`
appends to each story. No text can produce id 0: the string `<|endoftext|>` in a story is encoded as
ordinary characters.

The library would need much memory for large texts in some writing systems. During training, it
needs about 120 bytes for each byte of distinct pre-tokens, so `train` limits the total size of
distinct pre-tokens. During encoding, it needs about 180 bytes for each byte of text, so
`encode_stories` encodes long texts in pieces (`cut_texts`).
"""

from __future__ import annotations

import contextlib
import ctypes
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

END_OF_TEXT = "<|endoftext|>"  # the token, and the default separator of stories in text files
MIN_VOCAB_SIZE = 257  # the 256 bytes and END_OF_TEXT
MAX_VOCAB_SIZE = 65_536  # ids are stored in 16 bits

# No pre-token extends across the space before a word, so a text may be cut there and its words
# encoded one by one. Every character that is white space for the library is white space for Python
# too. `str.split` takes half the time of this pattern, and gives the same words if each space is
# before a word, as in nearly every story.
_WORD_BOUNDARY = re.compile(r" (?=\S)")
# A word, line feeds and a word without a space between them, as at the start of a paragraph.
_LINE_BREAK = re.compile(r"( ?\S+)(\n+)(\S+)")
_MAX_CACHED_WORDS = 100_000  # with the limit below, at most about 20 MB
_MAX_CACHED_LENGTH = 32  # characters; longer words are rarely repeated

# Positions that are pre-token boundaries in any context: before a white-space character that a
# non-space character follows, and between a letter or digit and the punctuation after it.
_CUT = re.compile(
    r"(?=[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]\S)"
    r"|(?<=[^\W_])"
    r"(?=[!-/:-@\[-`{-~\u2010-\u2027\u3001\u3002\u3008-\u3011\uff01-\uff0f\uff1a-\uff20])"
)
_PIECE = 2048  # characters after which a piece ends at the next cut position
_LONGEST_RUN = 1 << 16  # maximum length in characters of a run without a cut position
_LONGEST_TRAINED_RUN = 1024  # lower for training, as its time is quadratic in pre-token length
_DISTINCT_BYTES = 3_000_000  # total of distinct pre-tokens in training; 100 MB of English have less
_COUNTED_CHARACTERS = 1 << 16  # characters of text whose pre-tokens are counted at a time
# Similar to the library's pattern and five times as fast, which is enough for counting pre-tokens.
_PRE_TOKEN = re.compile(r" ?[^\W\d_]+| ?\d+| ?(?:[^\w\s]|_)+|\s+")


class Tokenizer:
    """Converter from text to token ids and back, created by `train` or `load`.

    Args:
        library: trained tokenizer of the `tokenizers` library, with the settings used by `train`.
    """

    end_of_text = 0

    def __init__(self, library: tokenizers.Tokenizer):
        self._library = library
        # END_OF_TEXT in a story is encoded as letters, not as id 0. The JSON does not store this.
        self._library.encode_special_tokens = True
        self._caches: list[_WordIds] = []  # those that no thread is using

    @classmethod
    def train(cls, stories: Iterable[str], vocab_size: int) -> Tokenizer:
        """Train a tokenizer on `stories`, which are streamed and not held in memory.

        The same stories give the same tokenizer. Training stops reading when the distinct
        pre-tokens reach about 3 MB; those of 100 MB of English stories stay below 3 MB. A sequence
        of more than 1,024 letters or punctuation marks may be split.

        Args:
            stories: texts to learn from.
            vocab_size: maximum number of tokens in the vocabulary, from 257 to 65,536. If the
                stories have few distinct words, the vocabulary is smaller.

        Returns:
            The tokenizer.

        Raises:
            UserError: `vocab_size` is out of range, or a story is not valid Unicode.
        """
        check_vocab_size(vocab_size)
        library = _untrained()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        pieces = cut_texts(((story, True) for story in _checked(stories)), _LONGEST_TRAINED_RUN)
        texts = _until_diverse(text for text, _ in pieces)
        del stories, pieces  # otherwise a long story would stay in memory during training
        library.train_from_iterator(texts, trainer)
        with contextlib.suppress(AttributeError, OSError, TypeError):  # no glibc
            ctypes.CDLL(None).malloc_trim(0)  # otherwise glibc keeps hundreds of MB
        return cls(library)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Load a tokenizer from a file that `save` wrote, or from an export in the format hf.

        Args:
            path: path of the file, such as tokenizer.json in a run folder.

        Returns:
            The tokenizer.

        Raises:
            UserError: the file cannot be read, or is not a byte-level BPE with END_OF_TEXT as id 0.
        """
        try:
            content = parse_json(read_text(Path(path)))
            if (largest := max(content["model"]["vocab"].values())) >= MAX_VOCAB_SIZE:
                # The library would allocate gigabytes for it.
                raise ValueError(f"the token id {largest} is too large")
            # That of an export would add END_OF_TEXT before each text.
            library = tokenizers.Tokenizer.from_str(json.dumps({**content, "post_processor": None}))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; give another file") from None
        except Exception:  # the library raises plain Exception for invalid files
            problem = f"{path} is not a valid tokenizer.json; use the one in a run folder"
            raise UserError(problem) from None
        if not _is_ours(library):
            expected = f"a byte-level BPE with {END_OF_TEXT} as token 0"
            raise UserError(f"{path} is another kind of tokenizer; expected {expected}")
        return cls(library)

    def save(self, path: str | Path) -> None:
        """Write the tokenizer as JSON, atomically.

        Args:
            path: file to write, such as tokenizer.json.
        """
        write_text(Path(path), self.to_json())

    def to_json(self) -> str:
        """Return the tokenizer in the JSON format of the `tokenizers` library."""
        return self._library.to_str(pretty=True)

    @property
    def vocab_size(self) -> int:
        """Number of ids, including END_OF_TEXT."""
        return self._library.get_vocab_size()

    @property
    def fingerprint(self) -> str:
        """Hash of the tokenizer's JSON; equal fingerprints mean equal ids for every text."""
        return hashlib.blake2b(self._library.to_str().encode(), digest_size=16).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text, without END_OF_TEXT.

        Args:
            text: any Unicode text.

        Returns:
            Token ids, each from 0 to `vocab_size` - 1.

        Raises:
            UserError: `text` contains a lone surrogate.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without END_OF_TEXT, computed on all cores.

        Args:
            texts: any Unicode texts. All texts are held in memory; `encode_stories` streams texts.

        Returns:
            One list of token ids per text.

        Raises:
            UserError: a text contains a lone surrogate.
        """
        return [encoding.ids for encoding in self._library.encode_batch_fast(list(_checked(texts)))]

    def encode_stories(self, stories: Iterable[str]) -> np.ndarray:
        """Return the ids of all stories in one array, with END_OF_TEXT after each story.

        The ids are those of `encode_batch`, with one exception. Long stories are encoded in pieces
        (`cut_texts`). A piece ends where white space or punctuation follows. If 65,536 characters
        have no such place, the piece ends after them, and the ids around this cut may differ.

        Args:
            stories: any Unicode texts, which are streamed.

        Returns:
            Ids [n_tokens] uint16.

        Raises:
            UserError: a story contains a lone surrogate.
        """
        return self.encode_pieces(cut_texts((story, True) for story in _checked(stories)))

    def encode_pieces(self, pieces: Iterable[tuple[str, bool]]) -> np.ndarray:
        """Return the ids of pieces of stories, with END_OF_TEXT at the end of each story.

        The ids of words are cached. All words that are not in the cache are encoded together, on
        all cores. Several threads may call this method at the same time; each uses its own cache.

        Args:
            pieces: output of `cut_texts`, without lone surrogates.

        Returns:
            Ids [n_tokens] uint16.
        """
        try:
            cache = self._caches.pop()
        except IndexError:  # every cache is in use
            cache = _WordIds(self._library)
        end = _stored([self.end_of_text])
        if len(cache) >= _MAX_CACHED_WORDS:
            cache.clear()
        parts: list[bytes] = []
        incomplete: list[tuple[int, list[str]]] = []  # index in `parts`, words
        for text, ends in pieces:
            n_misses, words = cache.n_misses, text.split(" ")
            words[0] = " " + words[0]
            try:
                ids = b"".join(map(cache.__getitem__, words))
            except KeyError:  # a space that is not followed by a word
                first, *rest = _WORD_BOUNDARY.split(text)
                words = [" " + first, *rest]
                ids = b"".join(map(cache.__getitem__, words))
            if cache.n_misses > n_misses:
                incomplete.append((len(parts), words))
            parts.append(ids)
            if ends:
                parts.append(end)
        cache.add_missing()
        for index, words in incomplete:
            parts[index] = b"".join(map(cache.__getitem__, words))
        cache.drop_long()
        self._caches.append(cache)
        return np.frombuffer(b"".join(parts), dtype="<u2")

    def decode(self, ids: Sequence[int]) -> str:
        r"""Return the text of `ids`, with `\ufffd` for incomplete characters.

        Args:
            ids: token ids, each from 0 to `vocab_size` - 1.

        Returns:
            The text; id 0 becomes the string `<|endoftext|>`.
        """
        return self._library.decode(list(ids), skip_special_tokens=False)

    def token(self, id: int) -> str:
        r"""Return the text of one token, including its leading space, such as " dad".

        Args:
            id: token id, from 0 to `vocab_size` - 1.

        Returns:
            The text, with `\ufffd` for incomplete characters.
        """
        return self.decode([id])


class _WordIds(dict[str, bytes]):
    """Cache of the ids of words, as the bytes of uint16 numbers.

    Most words follow a space, and their ids include this space: the key "word" has the ids of
    " word". The first word of a piece follows no space. A space is added to its key as a mark, so
    the key " word" has the ids of "word". Two short words with line feeds between them are looked
    up one by one, because most such pairs are rare. If there are several line feeds, the last one
    is a pre-token of its own.

    If a word is not in the cache, the look-up records the word and returns no bytes; `add_missing`
    encodes all recorded words. An empty key, or a key that begins with white space other than a
    space, raises KeyError.
    """

    def __init__(self, library: tokenizers.Tokenizer) -> None:
        super().__init__()
        self.n_misses = 0
        self._library = library
        self._missing: dict[str, str] = {}  # word, text to encode
        self._long: list[str] = []

    def __missing__(self, word: str) -> bytes:
        short = len(word) <= 2 * _MAX_CACHED_LENGTH
        if short and "\n" in word and (pair := _LINE_BREAK.fullmatch(word)):
            before, line_feeds, after = pair.groups()
            return self[before] + self[" " + line_feeds[1:]] + self[" \n"] + self[" " + after]
        if word.startswith(" "):
            self._missing[word] = word[1:]
        elif word and not word[0].isspace():
            self._missing[word] = " " + word
        else:
            raise KeyError(word)
        self.n_misses += 1
        return b""

    def add_missing(self) -> None:
        """Encode all words that look-ups did not find, and add them to the cache."""
        encodings = self._library.encode_batch_fast(list(self._missing.values()))
        for word, encoding in zip(self._missing, encodings, strict=True):
            self[word] = _stored(encoding.ids)
        self._long += [word for word in self._missing if len(word) > _MAX_CACHED_LENGTH]
        self._missing.clear()

    def drop_long(self) -> None:
        """Remove long words (over 32 characters) from the cache; such words are rarely repeated."""
        for word in self._long:
            self.pop(word, None)
        self._long.clear()


def _stored(ids: list[int]) -> bytes:
    return np.array(ids, dtype="<u2").tobytes()


def cut_texts(
    texts: Iterable[tuple[str, bool]], longest_run: int = _LONGEST_RUN
) -> Iterator[tuple[str, bool]]:
    """Yield texts in pieces, so that encoding the pieces usually gives the ids of the whole texts.

    A cut position is a pre-token boundary before white space or punctuation; a cut there does not
    change the ids. A piece ends at the first cut position after 2,048 characters. If the next
    `longest_run` characters have no cut position, the piece ends after these characters. Only in
    this case, the ids around the cut may change.

    Args:
        texts: pairs (part, is_last): a part of a text, and whether the text ends with it. The
            boundaries between parts do not affect the result.
        longest_run: number of characters, after the first 2,048 of a piece, that are searched for a
            cut position.

    Yields:
        A piece of at most 2,048 + `longest_run` characters, and whether it is the last piece of its
        text.
    """
    rest = ""
    for text, ends in texts:
        text, start = rest + text, 0
        while len(text) - start > _PIECE:
            limit = start + _PIECE + longest_run
            if match := _CUT.search(text, start + _PIECE, limit):
                end = match.start()
            elif len(text) > limit:
                end = limit
            else:
                break
            yield text[start:end], False
            start = end
        rest = text[start:]
        if ends:
            yield rest, True
            rest = ""
    if rest:
        yield rest, False


def _until_diverse(texts: Iterable[str]) -> Iterator[str]:
    """Yield `texts` until their distinct pre-tokens have a total of _DISTINCT_BYTES bytes.

    The pre-tokens are counted after each group of texts. If few pre-tokens of a group are new, the
    next group is four times as long, and only its last quarter is counted.
    """
    words: set[str] = set()  # words already counted, such as most words of a new English text
    pre_tokens: set[str] = set()
    group: list[str] = []
    n_characters = n_bytes = 0
    interval = _COUNTED_CHARACTERS  # characters, of which the last _COUNTED_CHARACTERS are counted
    for text in texts:
        yield text
        n_characters += len(text)
        if n_characters > interval - _COUNTED_CHARACTERS:
            group.append(text)
        if n_characters < interval:
            continue
        new_words = set(" ".join(group).split(" ")) - words
        group, n_characters = [], 0
        if len(words) > _MAX_CACHED_WORDS:
            words.clear()
        words.update(word for word in new_words if len(word) <= _MAX_CACHED_LENGTH)
        new = set(_PRE_TOKEN.findall(" ".join(sorted(new_words)))) - pre_tokens
        pre_tokens |= new
        n_new = len("".join(new).encode())
        n_bytes += n_new
        if n_bytes >= _DISTINCT_BYTES:
            return
        # While few pre-tokens are new, as in English, it is enough to count a quarter of the texts.
        interval = _COUNTED_CHARACTERS * (4 if n_new < _COUNTED_CHARACTERS / 256 else 1)


def check_vocab_size(vocab_size: int) -> None:
    """Raise UserError unless MIN_VOCAB_SIZE <= `vocab_size` <= MAX_VOCAB_SIZE."""
    if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        limits = f"must be from {MIN_VOCAB_SIZE} (256 bytes and {END_OF_TEXT}) to {MAX_VOCAB_SIZE}"
        raise UserError(limits, "vocab_size", vocab_size, fix={"vocab_size": 3000})


def utf8_length(text: str) -> int:
    """Return the number of bytes of `text` in UTF-8.

    Raises:
        UserError: `text` contains a lone surrogate, such as from a broken JSON escape.
    """
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        near = text[max(0, error.start - 20) : error.end + 20]
        problem = f"the text contains a lone surrogate, which is not a character, in {near!a}"
        raise UserError(f"{problem}; remove it, or write the complete character") from None


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
    """Return whether a tokenizer has the settings of `Tokenizer.train` and a valid vocabulary.

    Args:
        library: the tokenizer, in the class of the `tokenizers` library.
    """
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
