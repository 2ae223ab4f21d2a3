"""Emoji of four artists under the same English names, as data for papercut's training scripts.

    python benchmarks/emoji/emoji_data.py            # needs npm and `pip install resvg-py`; half a minute

The sets are fetched by name and version with `npm pack` and checked against their hash; nothing of them is in the
repository. A name is kept where at least three of the four have it; skin tones and flags are left out. What is written:

- `images.npy` (N, 64, 64, 3) uint8: every picture, on white. `held_out.npy`: pictures of names that no set is trained
  on, for the autoencoder's error.
- `captions.txt`: N lines "NAME, ARTIST style", then N lines "NAME". A bare name has three or four true pictures.
- `pictures.json`: name and artist of each picture. `prompts.txt`: captions for `tiue distill`, both kinds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

WORK = Path(os.environ.get("EMOJI_WORK", Path(__file__).parent / "work"))
SIZE, MARGIN = 64, 3
HELD_OUT = 40
"""Every so many names one is left out of the training."""
LEFT_OUT = ("skintone", "flag", "button", "oclock", "thirty", "keycap", "squared", "kissman", "kisswoman")
TONES = ("light", "medium", "dark")


@dataclass(frozen=True)
class Artist:
    """A set of emoji, its licence, and the word that captions have for its style."""

    word: str
    package: str
    version: str
    licence: str
    sha256: str

    @property
    def archive(self) -> str:
        return f"{self.package.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


ARTISTS = (
    Artist(
        "fluent", "@iconify-json/fluent-emoji-flat", "1.2.6", "MIT",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    Artist(
        "noto", "@iconify-json/noto", "1.2.9", "Apache-2.0",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    ),
    Artist(
        "blob", "@iconify-json/noto-v1", "1.2.5", "Apache-2.0",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
    ),
    Artist(
        "firefox", "@iconify-json/fxemoji", "1.2.2", "Apache-2.0",
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
    ),
)  # fmt: skip


def fetch(artist: Artist, folder: Path) -> dict[str, Any]:
    """The set's icons: iconify's JSON, out of the package of this very version and hash."""
    path = folder / artist.archive
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", f"{artist.package}@{artist.version}", "--pack-destination", str(folder)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != artist.sha256:
        what = f"{artist.package} {artist.version}"
        raise SystemExit(f"{path} is not {what}: its SHA-256 is {found}. Remove it and try again.")
    with tarfile.open(path) as archive:
        member = archive.extractfile("package/icons.json")
        assert member is not None
        return json.load(member)


def key(name: str) -> str:
    """What names of all sets have in common: one writes `red-heart` where another writes `redheart`."""
    return name.replace("-", "").lower()


def shared_names(sets: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """English names, and under each the icon that each artist has for it, where at least three artists have one."""
    icons: dict[str, dict[str, str]] = {}
    words: dict[str, str] = {}
    for artist, icon_set in sets.items():
        for icon in icon_set["icons"]:
            icons.setdefault(key(icon), {}).setdefault(artist, icon)
            # The name with the most hyphens has its words apart.
            words[key(icon)] = max(words.get(key(icon), icon), icon, key=lambda each: each.count("-"))
    return {
        words[one].replace("-", " "): found
        for one, found in sorted(icons.items())
        if len(found) >= 3 and not any(part in one for part in LEFT_OUT) and not words[one].endswith(TONES)
    }


def picture(icon_set: Mapping[str, Any], icon: str) -> str:
    """An icon as an SVG document of SIZE x SIZE pixels, on white, with a margin."""
    one = icon_set["icons"][icon]
    left, top = one.get("left", icon_set.get("left", 0)), one.get("top", icon_set.get("top", 0))
    width, height = (one.get(side, icon_set.get(side, 16)) for side in ("width", "height"))
    unit = max(width, height) / (SIZE - 2 * MARGIN)
    box = (left - (SIZE * unit - width) / 2, top - (SIZE * unit - height) / 2, SIZE * unit, SIZE * unit)
    view = " ".join(f"{value:.4f}" for value in box)
    paper = f'<rect x="{box[0]:.4f}" y="{box[1]:.4f}" width="{box[2]:.4f}" height="{box[3]:.4f}" fill="#fff"/>'
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {namespaces} width="{SIZE}" height="{SIZE}" viewBox="{view}">{paper}{one["body"]}</svg>'


def render(document: str) -> np.ndarray:
    """(SIZE, SIZE, 3) uint8."""
    import io

    import resvg_py
    from PIL import Image

    png = bytes(resvg_py.svg_to_bytes(svg_string=document))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def caption(name: str, artist: str | None) -> str:
    return name if artist is None else f"{name}, {artist} style"


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    sets = {artist.word: fetch(artist, WORK) for artist in ARTISTS}
    names = shared_names(sets)
    images, held_out, known = [], [], []
    for index, (name, icons) in enumerate(names.items()):
        for artist, icon in icons.items():
            drawn = render(picture(sets[artist], icon))
            if index % HELD_OUT == HELD_OUT - 1:
                held_out.append(drawn)
            else:
                images.append(drawn)
                known.append({"name": name, "artist": artist})
    captions = [caption(one["name"], one["artist"]) for one in known]
    bare = [one["name"] for one in known]
    np.save(WORK / "images.npy", np.stack(images))
    np.save(WORK / "held_out.npy", np.stack(held_out))
    (WORK / "pictures.json").write_text(json.dumps(known))
    (WORK / "captions.txt").write_text("\n".join([*captions, *bare]) + "\n")
    (WORK / "prompts.txt").write_text("\n".join([*captions, *dict.fromkeys(bare)]) + "\n")
    count = len({one["name"] for one in known})
    print(f"{len(images)} pictures of {count} names by {len(ARTISTS)} artists, and {len(held_out)} held out: {WORK}")


if __name__ == "__main__":
    main()
