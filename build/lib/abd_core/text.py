"""Captions: templates, EDA over WordNet, tokenising."""

from __future__ import annotations

import os
import random
import string
import tarfile
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import nltk
import open_clip
import torch
from nltk.corpus.reader.wordnet import WordNetCorpusReader

from abd_core import paths

# Captions of the embedded benchmark's training and poison pairs, for `str.format`.
TEMPLATES = (
    "an emoji of a {}.",
    "a drawing of a {}.",
    "a picture of a {}.",
    "an icon of a {}.",
    "a cartoon of a {}.",
    "a sticker of a {}.",
    "a small image of a {}.",
    "the emoji for {}.",
)

# English function words; EDA neither replaces them nor inserts their synonyms.
STOP_WORDS = frozenset(
    """
    i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers
    herself it its itself they them their theirs themselves what which who whom this that these those am is
    are was were be been being have has had having do does did doing a an the and but if or because as until
    while of at by for with about against between into through during before after above below to from up
    down in out on off over under again further then once here there when where why how all any both each
    few more most other some such no nor not only own same so than too very s t can will just don should now
    """.split()  # noqa: SIM905
)

_PUNCTUATION = string.punctuation + "“”‘’…–—"
_WORDNET_SHA256 = "c860b31a1c0143c15cd66103071bd47d46f26ec0b56f6bf6cb41cf0201202b1d"


def unpack_wordnet(*, cache: Path) -> Path:
    """Unpack the shipped WordNet 3.0, `data/wordnet.tar.xz`, once.

    Several processes may do so at the same time; one that dies half-way leaves nothing that looks whole.

    Args:
        cache: folder that receives the unpacked one (27 MB); made if absent.

    Returns:
        The folder of WordNet's database files, named after the archive's checksum.

    Raises:
        RunError: the archive is missing, or its SHA-256 is not the expected one.
    """
    folder = cache / f"wordnet-{_WORDNET_SHA256[:12]}"
    if folder.is_dir():
        return folder
    archive = paths.data_dir() / "wordnet.tar.xz"
    if (checksum := paths.sha256(archive)) != _WORDNET_SHA256:
        raise paths.RunError(f"damaged file: {archive}: SHA-256 is {checksum}, {_WORDNET_SHA256} expected")

    cache.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".wordnet-", dir=cache) as temporary:
        with tarfile.open(archive) as tar:
            tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.0 to 3.11.3 have none
            tar.extractall(temporary)
        try:
            os.rename(Path(temporary) / "wordnet", folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
    return folder


class _WordNet(WordNetCorpusReader):
    def map_wn(self, version: str = "wordnet") -> dict[str, str]:
        # Only WordNets of other languages need this map; NLTK builds it from a file that is not shipped here.
        return {}


@lru_cache(maxsize=1)
def wordnet() -> WordNetCorpusReader:
    """NLTK's reader over its own WordNet corpus where that is installed, else over the shipped one.

    Nothing is downloaded. The first call takes about two seconds. The reader seeks in open files: one thread
    at a time; a forked process opens its own.
    """
    try:
        root = str(nltk.data.find("corpora/wordnet"))
    except LookupError:
        root = str(unpack_wordnet(cache=paths.cache_dir()))
        nltk.data.path.append(root)  # NLTK refuses to read anywhere else
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The multilingual functions are not available")
        return _WordNet(root, None)


# A child shares its parent's open files and would move their positions.
os.register_at_fork(after_in_child=wordnet.cache_clear)


@lru_cache(maxsize=2**16)
def synonyms(word: str) -> tuple[str, ...]:
    """The other names of all synsets of an English word or its base form, as Wei & Zou (2019) use them.

    Returns:
        Sorted, in lower case, with spaces for underscores; empty where WordNet does not know the word.
    """
    if not word.isascii():  # WordNet is ASCII, but lower() maps the Kelvin sign to a "k"
        return ()
    word = word.lower()
    names = {name.replace("_", " ").lower() for synset in wordnet().synsets(word) for name in synset.lemma_names()}
    return tuple(sorted(names - {word}))


def _draw_synonyms(words: list[str], n: int, rng: random.Random) -> list[tuple[int, str]]:
    """(position, synonym) of at most n words at random: none a stop word, each with a synonym."""
    drawn: list[tuple[int, str]] = []
    for position in rng.sample(range(len(words)), len(words)):
        word = words[position].strip(_PUNCTUATION)
        if word.lower() not in STOP_WORDS and (choices := synonyms(word)):
            drawn.append((position, rng.choice(choices)))
            if len(drawn) == n:
                break
    return drawn


def _synonym(words: list[str], alpha: float, rng: random.Random) -> list[str]:
    words = list(words)
    for position, synonym in _draw_synonyms(words, _strength(words, alpha), rng):
        before, _, after = words[position].partition(words[position].strip(_PUNCTUATION))
        words[position] = before + synonym + after
    return words


def _insert(words: list[str], alpha: float, rng: random.Random) -> list[str]:
    inserted = list(words)
    for _, synonym in _draw_synonyms(words, _strength(words, alpha), rng):
        inserted.insert(rng.randint(0, len(inserted)), synonym)
    return inserted


def _swap(words: list[str], alpha: float, rng: random.Random) -> list[str]:
    words = list(words)
    if len(words) > 1:
        for _ in range(_strength(words, alpha)):
            i, j = rng.sample(range(len(words)), 2)
            words[i], words[j] = words[j], words[i]
    return words


def _delete(words: list[str], alpha: float, rng: random.Random) -> list[str]:
    return [word for word in words if rng.random() >= alpha] or [rng.choice(words)]


def _strength(words: list[str], alpha: float) -> int:
    return max(1, int(alpha * len(words)))


_OPERATIONS: dict[str, Callable[[list[str], float, random.Random], list[str]]] = {
    "synonym": _synonym,
    "insert": _insert,
    "swap": _swap,
    "delete": _delete,
}


def eda(
    caption: str,
    *,
    rng: random.Random,
    alpha: float = 0.1,
    ops: Sequence[str] = ("synonym", "insert", "swap", "delete"),
) -> str:
    """Easy data augmentation of one caption: one operation, drawn uniformly from `ops`, as CleanCLIP does.

    With n = max(1, floor(alpha * words)):

    - `synonym` replaces n words that are no stop words by a random synonym;
    - `insert` puts a random synonym of each of n such words at a random place;
    - `swap` exchanges two words, n times;
    - `delete` drops each word with probability alpha, but never all.

    Words are what whitespace separates; those not replaced keep their case and punctuation. A caption that an
    operation cannot change (one word to swap, no English word) keeps its words; it never becomes empty.

    Args:
        caption: any text.
        rng: the source of every draw.
        alpha: share of the words that changes, in (0, 1].
        ops: names of the operations to draw from.

    Raises:
        ValueError: `alpha` is out of range, or `ops` is empty or holds an unknown name.

    Source: Wei & Zou, "EDA: Easy Data Augmentation Techniques for Boosting Performance on Text Classification
    Tasks", EMNLP 2019.
    """
    if not 0 < alpha <= 1:
        raise ValueError(f"eda: alpha is {alpha}; it must lie in (0, 1]")
    if not ops or not _OPERATIONS.keys() >= set(ops):
        raise ValueError(f"eda: ops is {ops!r}; it must hold one or more of {', '.join(_OPERATIONS)}")
    words = caption.split()
    if not words:
        return caption
    return " ".join(_OPERATIONS[rng.choice(ops)](words, alpha, rng))


def augment(captions: Sequence[str], *, seed: int, epoch: int, ids: Sequence[int]) -> list[str]:
    """EDA of a batch, drawn afresh each epoch.

    A caption's draw depends on (seed, epoch, id) alone: not on its batch, on the order, or on a resumed run.

    Args:
        captions: B captions.
        seed: the run's seed.
        epoch: number of the epoch.
        ids: B numbers of the pairs within the data set.

    Raises:
        ValueError: `captions` and `ids` differ in length.
    """
    if len(captions) != len(ids):
        raise ValueError(f"augment: {len(captions)} captions but {len(ids)} ids; each caption needs one")
    # A string seed goes through SHA-512: the same in every process.
    return [
        eda(caption, rng=random.Random(f"{seed}/{epoch}/{number}"))
        for caption, number in zip(captions, ids, strict=True)
    ]


@lru_cache(maxsize=1)
def _plain_tokenizer() -> open_clip.SimpleTokenizer:
    """CLIP's tokenizer without its repair of broken Unicode and HTML, which takes most of its time."""
    tokenizer = open_clip.SimpleTokenizer()
    tokenizer.clean_fn = lambda text: " ".join(text.split()).lower()
    return tokenizer


@lru_cache(maxsize=2**16)
def _word_tokens(word: str) -> list[int]:
    return _plain_tokenizer().encode(word)


@lru_cache(maxsize=2**16)
def _token_row(caption: str, context_length: int) -> tuple[int, ...]:
    if not caption.isascii() or not caption.isprintable() or "&" in caption:  # there may be something to repair
        return tuple(open_clip.tokenize([caption], context_length)[0].tolist())
    # No token spans words: an augmented caption is new, and its words are not.
    tokens = [token for word in caption.split() for token in _word_tokens(word)][: context_length - 2]
    tokens = [_plain_tokenizer().sot_token_id, *tokens, _plain_tokenizer().eot_token_id]
    return (*tokens, *[0] * (context_length - len(tokens)))


def tokenize(captions: Sequence[str], *, context_length: int) -> torch.Tensor:
    """Tokens of CLIP's byte-pair encoding (49,408 tokens), each distinct caption encoded once.

    Args:
        captions: B captions.
        context_length: tokens a caption, at least 2 (start and end). Longer captions are cut, shorter
            ones padded with 0.

    Returns:
        int64, (B, context_length), in [0, 49407].

    Raises:
        TypeError: `captions` is one string, or holds something else than strings.
        ValueError: `context_length` is below 2.
    """
    if isinstance(captions, str):
        raise TypeError("tokenize: captions is one string; it must be a list of strings")
    if context_length < 2:
        raise ValueError(f"tokenize: context_length is {context_length}; it must be at least 2")
    for row, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise TypeError(f"tokenize: caption {row} is {caption!r}; it must be a string")
    rows = [_token_row(caption, context_length) for caption in captions]
    return torch.tensor(rows, dtype=torch.long).reshape(len(captions), context_length)
