"""Build `wordnet.tar.xz`, the copy of WordNet 3.0 that NLTK reads where its own corpus is not installed.

    apt-get install wordnet-base && python data/build_wordnet.py
    python data/build_wordnet.py WordNet-3.0/dict

The same input and liblzma give the same bytes. A new archive needs its SHA-256 in `abd_core/text.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import lzma
import tarfile
from pathlib import Path

DATA = Path(__file__).resolve().parent
PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")

# The lexicographer files in the order of their numbers: lexnames(5WN). NLTK needs the table, Debian drops it.
LEXICOGRAPHER_FILES = """
adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute noun.body
noun.cognition noun.communication noun.event noun.feeling noun.food noun.group noun.location noun.motive
noun.object noun.person noun.phenomenon noun.plant noun.possession noun.process noun.quantity noun.relation
noun.shape noun.state noun.substance noun.time verb.body verb.change verb.cognition verb.communication
verb.competition verb.consumption verb.contact verb.creation verb.emotion verb.motion verb.perception
verb.possession verb.social verb.stative verb.weather adj.ppl
""".split()  # noqa: SIM905


def lexnames() -> str:
    """The `lexnames` file: number, name and part of speech (1 to 4) of the 45 lexicographer files."""
    return "".join(
        f"{number:02d}\t{name}\t{PARTS_OF_SPEECH.index(name.split('.')[0]) + 1}\n"
        for number, name in enumerate(LEXICOGRAPHER_FILES)
    )


def licence(folder: Path) -> str:
    """The licence text, which heads every `data.*` file as numbered lines that begin with two spaces."""
    lines = (folder / "data.noun").read_text(encoding="utf-8").splitlines()
    return "".join(line.split(" ", 3)[3].rstrip() + "\n" for line in lines if line.startswith("  "))


def pack(folder: Path) -> bytes:
    """The uncompressed archive of `folder`'s database: names sorted; owner, mode and time fixed.

    Raises:
        FileNotFoundError: `folder` lacks one of the `index.*`, `data.*` or `*.exc` files.
    """
    names = [name for pos in PARTS_OF_SPEECH for name in (f"index.{pos}", f"data.{pos}", f"{pos}.exc")]
    files = {name: (folder / name).read_bytes() for name in names}
    files["lexnames"] = lexnames().encode()
    files["LICENSE"] = licence(folder).encode()

    tar_bytes = io.BytesIO()
    with tarfile.open(fileobj=tar_bytes, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in sorted(files):
            member = tarfile.TarInfo(f"wordnet/{name}")  # mode 0644, owner 0, time 0
            member.size = len(files[name])
            tar.addfile(member, io.BytesIO(files[name]))
    return tar_bytes.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description="Build data/wordnet.tar.xz.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("/usr/share/wordnet"), help="its `dict`")
    folder = parser.parse_args().folder

    archive = lzma.compress(pack(folder), preset=9 | lzma.PRESET_EXTREME)
    (DATA / "wordnet.tar.xz").write_bytes(archive)
    (DATA / "LICENSES").mkdir(exist_ok=True)
    (DATA / "LICENSES" / "WordNet.txt").write_text(licence(folder), newline="\n")
    print(f"wordnet.tar.xz  {len(archive):,} bytes  SHA-256 {hashlib.sha256(archive).hexdigest()}")


if __name__ == "__main__":
    main()
