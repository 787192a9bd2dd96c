"""Templates, WordNet, EDA and tokenising."""

from __future__ import annotations

import importlib.util
import json
import lzma
import multiprocessing
import os
import random
import shutil
import signal
import string
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import nltk
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.corpus.reader.wordnet import WordNetCorpusReader

from abd_core import paths, text

CAPTION = "A small Brown dog, running over the green grass near its happy owner"
CONTENT_WORDS = ["small", "Brown", "dog,", "running", "green", "grass", "near", "happy", "owner"]
LONG = " ".join(f"word{i}" for i in range(50))
OPS = ("synonym", "insert", "swap", "delete")
FORK = multiprocessing.get_context("fork")
forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

HOSTILE = {
    "empty": "",
    "spaces": " \t\n",
    "one word": "dog",
    "one stop word": "the",
    "one letter": "k",
    "punctuation": "... -- !?",
    "Chinese": "草地上 的 一只 狗",
    "Russian": "Маленькая собака, бегущая по траве",
    "Arabic": "كلب صغير",
    "emoji": "🐶 🍎 👩‍🚀",
    "accents": "Crème brûlée à l'œuf",
    "Kelvin sign": "\u212a \u212a",
    "NUL": "a\0b dog\0 \0",
    "lone surrogate": "\ud800 dog",
    "format braces": "{} {0} {dog} %s \\n",
    "long": "small dog " * 5_000,
    "one long word": "dog" + "!" * 10_000 + "dog",
}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text.unpack_wordnet(cache=tmp_path_factory.mktemp("cache"))


def draws(caption: str, op: str, n: int = 200, **options: float) -> list[str]:
    return [text.eda(caption, rng=random.Random(seed), ops=[op], **options) for seed in range(n)]


def listed(word: str) -> set[str]:
    """What WordNet names as the same, asked of NLTK directly."""
    lemmas = [lemma for synset in text.wordnet().synsets(word) for lemma in synset.lemmas()]
    return {lemma.name().replace("_", " ").lower() for lemma in lemmas} - {word.lower()}


def phrases(before: str, after: str, *, width: int) -> list[tuple[int, str]]:
    """Each (i, phrase) with which `after` is `before`, the phrase in place of `width` words at i."""
    old, new = before.split(), after.split()
    grown = len(new) - len(old) + width
    return [
        (i, " ".join(new[i : i + grown]))
        for i in range(len(old) - width + 1)
        if new == old[:i] + new[i : i + grown] + old[i + width :]
    ]


def is_subsequence(part: list[str], whole: list[str]) -> bool:
    rest = iter(whole)
    return all(word in rest for word in part)


# --- the four operations ------------------------------------------------------------------------------------


def test_synonym_replacement_changes_one_content_word_in_ten_to_what_wordnet_lists():
    positions = set()
    for result in draws(CAPTION, "synonym"):
        places = phrases(CAPTION, result, width=1)
        found = [i for i, phrase in places if phrase.strip(",") in listed(CAPTION.split()[i].strip(","))]
        assert found, result
        positions.update(found)
    assert [CAPTION.split()[i] for i in sorted(positions)] == CONTENT_WORDS


def test_synonym_replacement_keeps_the_punctuation_around_the_word():
    results = draws("“(dog),”", "synonym")
    assert {result[:2] + result[-3:] for result in results} == {"“(),”"}
    assert {result[2:-3] for result in results} <= listed("dog")


def test_insertion_adds_a_synonym_of_each_of_n_words(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text, "synonyms", lambda word: (f"<{word}>",))
    for result in draws(LONG, "insert", alpha=0.1):
        added = [word for word in result.split() if word.startswith("<")]
        assert len(set(added)) == len(added) == 5
        assert {word.strip("<>") for word in added} < set(LONG.split())
        assert [word for word in result.split() if word not in added] == LONG.split()


def test_insertion_adds_words_that_wordnet_lists():
    allowed = set().union(*(listed(word.strip(",")) for word in CONTENT_WORDS))
    positions = set()
    for result in draws(CAPTION, "insert"):
        found = [i for i, phrase in phrases(CAPTION, result, width=0) if phrase in allowed]
        assert found, result
        positions.update(found)
    assert positions == set(range(len(CAPTION.split()) + 1))  # from before the first to behind the last


@pytest.mark.parametrize("op", ["synonym", "insert"])
def test_stop_words_are_neither_replaced_nor_inserted_from(op: str):
    caption = "a in Have more, I can be over it"
    assert all(listed(word.strip(",")) for word in caption.split()[:-1])
    assert set(draws(caption, op)) == {caption}


@pytest.mark.parametrize(("alpha", "swaps"), [(0.01, 1), (0.1, 5)])
def test_swap_keeps_the_multiset_of_words_and_moves_two_words_a_swap(alpha: float, swaps: int):
    words = LONG.split()
    moved = []
    for result in draws(LONG, "swap", alpha=alpha):
        assert Counter(result.split()) == Counter(words)
        moved.append(sum(a != b for a, b in zip(words, result.split(), strict=True)))
    assert max(moved) == 2 * swaps
    assert min(moved) > 0 or swaps > 1  # several swaps may undo each other


def test_deletion_gives_a_subsequence_and_drops_a_share_alpha():
    words = LONG.split()
    results = [result.split() for result in draws(LONG, "delete", alpha=0.3)]
    assert all(is_subsequence(result, words) for result in results)
    dropped = sum(len(words) - len(result) for result in results)
    assert 0.27 < dropped / (200 * 50) < 0.33  # 6.5 standard deviations


def test_deletion_of_everything_leaves_one_word_at_random():
    assert set(draws("one two three", "delete", alpha=1.0)) == {"one", "two", "three"}


def test_one_operation_a_caption_is_drawn_uniformly(monkeypatch: pytest.MonkeyPatch):
    named = {name: lambda words, alpha, rng, name=name: [name] for name in OPS}
    monkeypatch.setattr(text, "_OPERATIONS", named)
    rng = random.Random(0)
    counts = Counter(text.eda(CAPTION, rng=rng) for _ in range(4_000))
    assert counts.keys() == set(OPS)
    assert all(850 < count < 1_150 for count in counts.values())  # 1,000, 5.5 standard deviations


# --- seeds --------------------------------------------------------------------------------------------------


def augmented(seed: int = 0, epoch: int = 0, ids: range = range(100)) -> list[str]:
    return text.augment([CAPTION] * len(ids), seed=seed, epoch=epoch, ids=ids)


def test_augmentation_repeats_with_its_seed_and_is_fresh_for_each_epoch_seed_and_pair():
    assert augmented() == augmented()
    for other in (augmented(epoch=1), augmented(seed=1), augmented(ids=range(100, 200))):
        assert sum(a != b for a, b in zip(augmented(), other, strict=True)) > 80
    assert len(set(augmented())) > 60


def test_augmentation_does_not_depend_on_the_batch_or_its_order():
    captions = [f"{CAPTION} {i}" for i in range(40)]
    whole = dict(zip(captions, text.augment(captions, seed=3, epoch=2, ids=range(40)), strict=True))
    order = random.Random(0).sample(range(40), 40)
    for batch in (order[:7], order[7:]):
        chosen = [captions[i] for i in batch]
        assert text.augment(chosen, seed=3, epoch=2, ids=batch) == [whole[caption] for caption in chosen]


def test_augmentation_takes_the_ids_of_a_tensor_as_those_of_a_list():
    assert text.augment([CAPTION] * 9, seed=0, epoch=0, ids=torch.arange(9)) == augmented(ids=range(9))


@pytest.mark.slow
def test_augmentation_is_the_same_in_every_process():
    script = f"""
import json
from abd_core import text
print(json.dumps(text.augment([{CAPTION!r}] * 100, seed=0, epoch=0, ids=range(100))))
"""
    children = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=Path(__file__).parents[1],
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
        )
        for seed in ("0", "1")
    ]
    outputs = [json.loads(child.communicate()[0]) for child in children]
    assert outputs == [augmented(), augmented()]


# --- hostile captions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("caption", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_captions_come_through_unharmed(caption: str, op: str):
    for result in draws(caption, op, n=5):
        words = result.split()
        assert bool(result) == bool(caption)
        assert bool(words) == bool(caption.split())
        if op == "swap":
            assert Counter(words) == Counter(caption.split())
        if op == "delete":
            assert is_subsequence(words, caption.split())
        if op == "insert":
            assert is_subsequence(caption.split(), words)
        if op == "synonym" and not caption.isascii():
            assert [w for w in words if not w.isascii()] == [w for w in caption.split() if not w.isascii()]


@settings(max_examples=200, deadline=None)
@given(
    caption=st.text() | st.lists(st.sampled_from(["dog", "the", "狗", "Run,", "\0", "🐶"])).map(" ".join),
    op=st.sampled_from(OPS),
    alpha=st.floats(0, 1, exclude_min=True),
    seed=st.integers(0, 2**32),
)
def test_any_caption_stays_what_the_operation_promises(caption: str, op: str, alpha: float, seed: int):
    before = caption.split()
    after = text.eda(caption, rng=random.Random(seed), alpha=alpha, ops=[op]).split()
    assert bool(after) == bool(before)
    if op == "swap":
        assert Counter(after) == Counter(before)
    if op == "delete":
        assert is_subsequence(after, before)
    if op == "insert":
        assert is_subsequence(before, after)
        assert len(after) >= len(before)
    if op == "synonym":
        assert len(after) >= len(before)
        assert is_subsequence([word for word in before if not word.isascii()], after)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, r"alpha is 0.0; it must lie in \(0, 1\]"),
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"ops": []}, "one or more of synonym, insert, swap, delete"),
        ({"ops": ["swap", "shuffle"]}, "shuffle.*one or more of synonym, insert, swap, delete"),
        ({"ops": "swap"}, "'swap'; it must hold"),
    ],
)
def test_bad_settings_are_refused_in_one_clear_line(options: dict, message: str):
    with pytest.raises(ValueError, match=message) as error:
        text.eda("", rng=random.Random(0), **options)
    assert "\n" not in str(error.value)


def test_captions_without_ids_are_refused():
    with pytest.raises(ValueError, match="2 captions but 1 ids"):
        text.augment(["a", "b"], seed=0, epoch=0, ids=[0])


# --- WordNet ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "some"),
    [
        ("dog", {"domestic dog", "hound"}),
        ("Dogs", {"dog", "hound"}),
        ("grass", {"pot", "grass over"}),
        ("happy", {"felicitous", "glad"}),
        ("feet", {"foot"}),  # noun.exc
        ("emoji", set()),
        ("", set()),
    ],
)
def test_synonyms_are_the_sorted_names_of_all_synsets(word: str, some: set[str]):
    assert list(text.synonyms(word)) == sorted(listed(word))
    assert set(text.synonyms(word)) >= some


def test_the_archive_is_what_its_build_script_packs(unpacked: Path):
    script = Path(__file__).parents[1] / "data" / "build_wordnet.py"
    spec = importlib.util.spec_from_file_location("build_wordnet", script)
    build_wordnet = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build_wordnet)
    packed = lzma.decompress((paths.data_dir() / "wordnet.tar.xz").read_bytes())
    assert build_wordnet.pack(unpacked) == packed
    licence = (paths.data_dir() / "LICENSES" / "WordNet.txt").read_text()
    assert "Permission to use, copy, modify and distribute" in licence
    assert (unpacked / "LICENSE").read_text() == licence


def test_an_unpacked_archive_is_used_again(unpacked: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(paths, "data_dir", lambda: tmp_path)  # no archive there
    assert text.unpack_wordnet(cache=unpacked.parent) == unpacked


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"\0" + b[1:], lambda b: b""])
def test_a_damaged_archive_is_refused_and_leaves_nothing(damage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    whole = (paths.data_dir() / "wordnet.tar.xz").read_bytes()
    (tmp_path / "wordnet.tar.xz").write_bytes(damage(whole))
    monkeypatch.setattr(paths, "data_dir", lambda: tmp_path)
    with pytest.raises(paths.RunError, match=r"wordnet.tar.xz: SHA-256 is \w+, \w+ expected"):
        text.unpack_wordnet(cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def _unpack_until_killed(cache: Path) -> None:
    def extract_half(tar: tarfile.TarFile, folder: str, **options: str) -> None:
        tar.extract("wordnet/data.noun", folder, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    tarfile.TarFile.extractall = extract_half
    text.unpack_wordnet(cache=cache)


@forks
def test_a_process_killed_half_way_leaves_nothing_that_is_taken_for_the_whole(tmp_path: Path, unpacked: Path):
    child = FORK.Process(target=_unpack_until_killed, args=(tmp_path,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert list(tmp_path.rglob("data.noun")), "the child died before it wrote anything"
    assert not (tmp_path / unpacked.name).exists()
    folder = text.unpack_wordnet(cache=tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in unpacked.iterdir())


def _unpack_together(cache: Path, barrier: multiprocessing.Barrier) -> None:
    rename = os.rename

    def rename_at_once(source: Path, target: Path) -> None:
        barrier.wait(timeout=120)
        rename(source, target)

    os.rename = rename_at_once
    text.unpack_wordnet(cache=cache)


@forks
def test_two_processes_at_once_both_succeed(tmp_path: Path, unpacked: Path):
    barrier = FORK.Barrier(2)
    children = [FORK.Process(target=_unpack_together, args=(tmp_path, barrier)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    assert [p.name for p in tmp_path.iterdir()] == [unpacked.name]
    assert all((tmp_path / unpacked.name / p.name).read_bytes() == p.read_bytes() for p in unpacked.iterdir())


def _use_own_reader(parent: WordNetCorpusReader) -> None:
    assert text.wordnet() is not parent


@forks
def test_a_forked_process_does_not_share_the_open_files_of_its_parent():
    child = FORK.Process(target=_use_own_reader, args=(text.wordnet(),))
    child.start()
    child.join()
    assert child.exitcode == 0


@pytest.fixture
def nltk_path(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.delenv("NLTK_DATA", raising=False)
    text.wordnet.cache_clear()
    yield nltk.data.path
    text.wordnet.cache_clear()


def test_nltk_s_own_corpus_is_used_where_it_is_installed(nltk_path: list[str], tmp_path: Path, unpacked: Path):
    (tmp_path / "corpora").mkdir(mode=0o755)
    shutil.copytree(unpacked, tmp_path / "corpora" / "wordnet")
    (tmp_path / "corpora" / "wordnet").chmod(0o755)  # NLTK reads no folder that others may write
    nltk_path.append(str(tmp_path))
    assert Path(text.wordnet().root) == tmp_path / "corpora" / "wordnet"
    assert "hound" in listed("dog")


def test_the_shipped_corpus_is_used_where_nltk_has_none(nltk_path: list[str], unpacked: Path, monkeypatch):
    monkeypatch.setattr(paths, "cache_dir", lambda: unpacked.parent)
    assert Path(text.wordnet().root) == unpacked
    assert "hound" in listed("dog")


# --- templates and tokens -----------------------------------------------------------------------------------


def test_each_template_takes_one_label_and_no_two_are_the_same():
    captions = {template.format("{red} apple") for template in text.TEMPLATES}
    assert len(captions) == len(text.TEMPLATES)
    assert all(caption.count("{red} apple") == 1 for caption in captions)
    fields = [[name for _, name, _, _ in string.Formatter().parse(t) if name is not None] for t in text.TEMPLATES]
    assert fields == [[""]] * len(text.TEMPLATES)


@pytest.mark.parametrize("context_length", [2, 16, 77])
def test_tokens_equal_those_of_open_clip(context_length: int):
    captions = [*HOSTILE.values(), CAPTION, CAPTION]
    expected = open_clip.get_tokenizer("RN50")(captions, context_length=context_length)
    tokens = text.tokenize(captions, context_length=context_length)
    assert tokens.dtype == torch.long
    assert torch.equal(tokens, expected)


def test_no_tokens_for_no_captions():
    assert text.tokenize([], context_length=16).shape == (0, 16)


def test_a_word_is_encoded_once_and_later_changes_to_tokens_do_not_come_back(monkeypatch: pytest.MonkeyPatch):
    encoded, tokenizer = [], text._plain_tokenizer()
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda word: encoded.append(word) or encode(word))
    text._token_row.cache_clear()
    text._word_tokens.cache_clear()
    first = text.tokenize(["a dog", "cat", "a dog"], context_length=8)
    expected = first.clone()
    first.zero_()
    assert torch.equal(text.tokenize(["a dog", "cat", "a dog"], context_length=8), expected)
    assert encoded == ["a", "dog", "cat"]


@given(captions=st.lists(st.text(max_size=80), max_size=4), context_length=st.sampled_from([2, 5, 77]))
def test_tokens_of_any_text_are_those_of_open_clip(captions: list[str], context_length: int):
    expected = open_clip.tokenize(captions, context_length)
    assert torch.equal(text.tokenize(captions, context_length=context_length), expected)


@pytest.mark.parametrize(
    ("captions", "context_length", "error", "message"),
    [
        ("a dog", 77, TypeError, "captions is one string"),
        (["a dog", None], 77, TypeError, "caption 1 is None; it must be a string"),
        (["a dog"], 1, ValueError, "context_length is 1; it must be at least 2"),
        (["a dog"], 0, ValueError, "context_length is 0"),
    ],
)
def test_bad_captions_are_refused_in_one_clear_line(captions, context_length: int, error: type, message: str):
    with pytest.raises(error, match=message):
        text.tokenize(captions, context_length=context_length)
