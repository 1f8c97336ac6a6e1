"""Speech emotion corpora in, standardisable MFCC windows out.

    python features.py                                            # generates the smoke test and indexes it
    python features.py --dataset emodb --root /data/emodb         # what is there: classes, speakers, folds, minutes
    python features.py --dataset emodb --json index.json          # the same index as a file

A corpus is a function from a folder to a list of `Utterance`, and a row of `CORPORA`. `folds` turns the list into
speaker-independent folds. `load` computes the windows once and keeps them on disk:

    wav -> mono, 16 kHz -> 8-second windows -> MFCC (128, 512) -> max over 4 frames -> (F, T) = (128, 128), float32
"""

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import struct
import sys
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import scipy.signal
import torch
import torchaudio
from scipy.io import wavfile

CLASSES = ("angry", "happy", "neutral", "sad")


class InputError(Exception):
    """Something that a user gave cannot be used. The message says what was found, what was expected, what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# Corpora


@dataclass(frozen=True)
class Utterance:
    path: Path
    label: str
    speaker: str
    group: str  # the unit that the folds hold out: a speaker, a session, a range of speakers


def files_below(root, name, depth=2):
    """Files whose name matches the regular expression `name`, at most `depth` folders below `root`; each name once,
    sorted. Hidden files (AppleDouble `._x.wav`, `.DS_Store`) are passed over."""
    found = {}
    for folder, folders, files in os.walk(root, followlinks=True):
        level = len(Path(folder).relative_to(root).parts)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and level < depth)
        for file in sorted(files):
            if not file.startswith(".") and re.fullmatch(name, file, re.IGNORECASE):
                found.setdefault(file, Path(folder, file))
    return [found[file] for file in sorted(found)]


def index_emodb(root):
    """`03a01Wa.wav`: speaker 03, text a01, emotion W (Wut, anger), version a. A is Angst: fear, not anger."""
    letters = {"W": "angry", "F": "happy", "N": "neutral", "T": "sad"}
    for path in files_below(root, r"\d\d[a-z]\d\d[WFNTAEL][a-z]?\.wav"):
        if path.name[5].upper() in letters:
            speaker = path.name[:2]
            yield Utterance(path, letters[path.name[5].upper()], speaker, group=speaker)


def generate_smoke(root):
    """The corpus of the first minute: voiced sounds, not speech. A train of pulses through four resonances, with a
    melody, a loudness, a tempo and a brightness that depend on the emotion, and a pitch and a vocal tract that depend
    on the speaker, written as EMO-DB writes its files. It shows that everything runs; it says nothing about speech."""
    #          letter: pitch, melody, loudness, syllables/s, spectral tilt
    voices = {"W": (1.35, 0.30, 0.60, 5.5, 0.80), "F": (1.45, 0.45, 0.40, 5.0, 0.88),
              "N": (1.00, 0.12, 0.25, 4.2, 0.94), "T": (0.90, 0.06, 0.12, 3.0, 0.98)}  # fmt: skip
    vowels = np.array([[700, 1200, 2600, 3500], [400, 2000, 2600, 3500], [300, 900, 2300, 3300], [500, 1500, 2500, 3500]])
    rng = np.random.default_rng(0)
    shutil.rmtree(root / "wav", ignore_errors=True)
    making = root / "wav.part"
    making.mkdir(parents=True, exist_ok=True)
    for speaker in range(3, 9):
        tract, voice = rng.uniform(0.85, 1.2), rng.uniform(100, 230)
        for letter, (pitch, melody, loudness, tempo, tilt) in voices.items():
            for text in range(1, 11):
                pitch_, melody_, loudness_, tempo_ = np.array([pitch, melody, loudness, tempo]) * rng.normal(1, 0.12, 4)
                t = np.arange(int(16000 * rng.uniform(1.2, 2.6))) / 16000
                f0 = voice * pitch_ * (1 + melody_ * np.sin(2 * np.pi * (0.4 * tempo_ * t + rng.random())))
                pulses = (np.diff(np.floor(np.cumsum(f0) / 16000), prepend=0) > 0) + 0.02 * rng.standard_normal(len(t))
                sound = scipy.signal.lfilter([1 - tilt], [1, -tilt], pulses)
                for formant in vowels[rng.integers(4)] * tract:
                    r = math.exp(-math.pi * 90 / 16000)  # a resonance 90 Hz wide
                    sound = scipy.signal.lfilter([1 - r], [1, -2 * r * math.cos(2 * math.pi * formant / 16000), r * r], sound)
                sound *= (1 - np.cos(2 * np.pi * tempo_ * t)) / 2  # syllables
                sound = loudness_ * sound / np.abs(sound).max() + 1e-3 * rng.standard_normal(len(t))
                name = f"{speaker:02}a{text:02}{letter}a.wav"
                wavfile.write(making / name, 16000, (32767 * np.clip(sound, -1, 1)).astype(np.int16))
    making.rename(root / "wav")


@dataclass(frozen=True)
class Corpus:
    index: Callable  # root -> iterable of Utterance
    source: str  # where it comes from
    expected: tuple  # known counts of angry, happy, neutral, sad
    looked_for: str  # what the index looks for, said when nothing was found
    scale: str = "small"  # default of train.py --scale
    folds: str = ""  # default of train.py --folds


CORPORA = {
    "smoke": Corpus(index_emodb, "generated", (60,) * 4, "generated wav files", folds="0,1"),
    "emodb": Corpus(
        index_emodb,
        "free, from the authors' site: Burkhardt et al., A Database of German Emotional Speech, Interspeech 2005",
        (127, 71, 79, 62),
        "files named like 03a01Wa.wav, at most two folders down",
    ),
}


def read_corpus(dataset, root=None):
    """-> (root, list of Utterance sorted by path). Prints a warning when the counts are not the known ones.

    Raises InputError for an unknown dataset and for a root at which nothing is found.
    """
    if dataset not in CORPORA:
        raise InputError(f"unknown dataset {dataset!r}; known: {', '.join(CORPORA)}")
    corpus = CORPORA[dataset]
    root = Path(root or Path("data", dataset))
    if dataset == "smoke" and len(list(corpus.index(root))) != sum(corpus.expected):
        generate_smoke(root)
    utterances = sorted(corpus.index(root), key=lambda u: u.path)
    if not utterances:
        there = f"it holds {', '.join(sorted(p.name for p in root.iterdir())[:5]) or 'nothing'}" if root.is_dir() else "no such folder"
        raise InputError(
            f"no utterance of {dataset} in {root} ({there}); looked for {corpus.looked_for}. "
            f"{dataset} is {corpus.source}. Put it there, or name its folder with --root DIR"
        )
    counts = Counter(u.label for u in utterances)
    if tuple(counts[c] for c in CLASSES) != corpus.expected:
        print(
            f"warning: {dataset} has {', '.join(f'{counts[c]} {c}' for c in CLASSES)}; "
            f"expected {', '.join(f'{n} {c}' for n, c in zip(corpus.expected, CLASSES))}",
            file=sys.stderr,
        )
    return root, utterances


@dataclass(frozen=True)
class Fold:
    """Indices into the list of utterances. No speaker is on two of the three sides."""

    train: list
    validation: list
    test: list


def folds(utterances):
    """One fold for each group, in sorted order: the group tests, the next one validates, all others train."""
    groups = sorted({u.group for u in utterances})
    if len(groups) < 3:
        raise InputError(
            f"found {len(groups)} speaker group(s) ({', '.join(groups)}); a fold needs three: one to test, one to validate, "
            "one to train"
        )
    return [
        Fold(
            train=[i for i, u in enumerate(utterances) if u.group not in (test, validation)],
            validation=[i for i, u in enumerate(utterances) if u.group == validation],
            test=[i for i, u in enumerate(utterances) if u.group == test],
        )
        for test, validation in zip(groups, groups[1:] + groups[:1])
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Features

RATE, FFT, HOP, POOL = 16000, 1024, 250, 4  # Hz; samples (64 ms), samples (15.6 ms); frames that one maximum is taken of
FRAME = HOP * POOL / RATE  # seconds between two columns of the map


@dataclass(frozen=True)
class Settings:
    """Everything that the values of the features depend on, beside the recordings."""

    coefficients: int = 128  # MFCCs, of 128 mel bands
    window: float = 8.0  # seconds
    padding: str = "repeat"  # of utterances shorter than a window: "repeat" the utterance, or "zero"

    def __post_init__(self):
        if not 1 <= self.coefficients <= 128:
            raise InputError(f"found {self.coefficients} coefficients; expected 1 to 128, the number of mel bands")
        if not self.window >= FRAME or self.window / FRAME % 1:
            raise InputError(f"found a window of {self.window} s; expected a multiple of {FRAME} s")
        if self.padding not in ("repeat", "zero"):
            raise InputError(f"unknown padding {self.padding!r}; known: repeat, zero")

    @property
    def shape(self):
        """(F, T) of a window."""
        return self.coefficients, round(self.window / FRAME)


def read_wav(path):
    """-> float32 samples in -1..1, mono, 16 kHz. Raises InputError, with the reason, for what is not such a file."""
    with open(path, "rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise InputError(f"{path}: a git-lfs stub, not audio; run `git lfs pull` in the corpus")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            rate, samples = wavfile.read(path)
    except (ValueError, EOFError, UnboundLocalError, ZeroDivisionError, struct.error) as error:  # as scipy has them
        raise InputError(f"{path}: not a readable wav file ({error})") from None
    for warning in said:
        if "EOF" in str(warning.message):
            raise InputError(f"{path}: truncated; copy it again from the corpus")
    if samples.size == 0:
        raise InputError(f"{path}: holds no samples")
    if samples.dtype.kind == "u":
        samples = (samples.astype(np.float32) - 128) / 128
    elif samples.dtype.kind == "i":
        samples = samples.astype(np.float32) / np.iinfo(samples.dtype).max
    if samples.ndim == 2:  # (samples, channels)
        samples = samples.mean(axis=1)
    if not np.isfinite(samples).all():
        raise InputError(f"{path}: holds samples that are not finite")
    if rate != RATE:
        common = math.gcd(rate, RATE)
        samples = scipy.signal.resample_poly(samples, RATE // common, rate // common)
    return samples.astype(np.float32)


def windows(samples, settings):
    """(samples,) -> (W, window). Nothing is lost: the last window of a long utterance ends with the utterance and
    overlaps the one before; a short utterance is padded."""
    size = round(settings.window * RATE)
    if len(samples) <= size:
        if settings.padding == "repeat":
            return np.resize(samples, (1, size))  # repeats the samples until they fill the window
        return np.pad(samples, (0, size - len(samples)))[None]
    starts = [*range(0, len(samples) - size, size), len(samples) - size]
    return np.stack([samples[start : start + size] for start in starts])


def mfcc(settings):
    """-> a function (window,) -> (F, T) = settings.shape, both torch.Tensor.

    Windows go through one by one: torchaudio clamps a batch at 80 dB below the loudest of its windows.
    """
    mel = dict(n_fft=FFT, hop_length=HOP, n_mels=128)
    transform = torchaudio.transforms.MFCC(RATE, settings.coefficients, log_mels=False, melkwargs=mel)

    def compute(window):
        frames = transform(window)[:, :-1]  # (F, POOL * T + 1) -> (F, POOL * T): the last frame is centred on the end
        return frames.unflatten(1, (-1, POOL)).amax(dim=2)  # (F, T, POOL) -> (F, T)

    return compute


@dataclass
class Store:
    """The windows of a corpus. Utterance i has the windows first[i] .. first[i + 1] - 1."""

    features: np.ndarray  # (windows, F, T) float32, memory-mapped
    first: np.ndarray  # (utterances + 1,)
    seconds: np.ndarray  # (utterances,)

    def windows_of(self, utterances):
        """Indices of utterances -> (indices of their windows, and for each window its place in `utterances`)."""
        counts = self.first[1:] - self.first[:-1]
        window = np.concatenate([np.arange(self.first[i], self.first[i + 1]) for i in utterances])
        return window, np.repeat(np.arange(len(utterances)), counts[utterances])


def load(root, utterances, settings=Settings(), cache="cache", name="corpus", progress=lambda text: None):
    """-> Store. Computes the features once; later calls find them in `cache`, under a key that covers the settings,
    the files (names, sizes, times of change) and torchaudio's version."""
    files = [[str(u.path.relative_to(root)), u.path.stat().st_size, u.path.stat().st_mtime_ns] for u in utterances]
    key = json.dumps([1, torchaudio.__version__, asdict(settings), files])
    folder = Path(cache, f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}")
    if not folder.exists():
        making = folder.with_name(folder.name + f".{os.getpid()}.part")
        making.mkdir(parents=True, exist_ok=True)
        compute, maps, counts, seconds = mfcc(settings), [], [], []
        started = time.time()
        for n, u in enumerate(utterances, start=1):
            samples = read_wav(u.path)
            cut = windows(samples, settings)
            maps += [compute(torch.from_numpy(window)).numpy() for window in cut]
            counts.append(len(cut))
            seconds.append(len(samples) / RATE)
            progress(f"features {n}/{len(utterances)}, {(time.time() - started) / n * (len(utterances) - n):.0f} s left")
        np.save(making / "features.npy", np.stack(maps))
        (making / "store.json").write_text(json.dumps({"windows": counts, "seconds": seconds}))
        making.rename(folder)
    try:
        about = json.loads((folder / "store.json").read_text())
        first = np.concatenate([[0], np.cumsum(np.array(about["windows"], dtype=int))])
        seconds = np.array(about["seconds"], dtype=float)
        features = np.load(folder / "features.npy", mmap_mode="r", allow_pickle=False)
        ok = len(first) == len(utterances) + 1 == len(seconds) + 1 and features.shape == (first[-1], *settings.shape)
    except (OSError, ValueError, KeyError, TypeError):
        ok = False
    if not ok:
        raise InputError(f"{folder} does not hold the features of {len(utterances)} utterances; delete it to have them computed again")
    return Store(features, first, seconds)


# ---------------------------------------------------------------------------------------------------------------------


def describe(dataset, utterances, parts, store):
    """The lines that `python features.py` prints."""
    counts = Counter(u.label for u in utterances)
    speakers = sorted({u.speaker for u in utterances})
    yield f"{dataset}: {len(utterances)} utterances, {store.seconds.sum() / 60:.1f} minutes, {len(store.features)} windows"
    yield "classes   " + ", ".join(f"{counts[c]} {c}" for c in CLASSES)
    yield f"speakers  {len(speakers)}: {' '.join(speakers)}"
    for k, fold in enumerate(parts):
        sides = (
            f"{side} {' '.join(sorted({utterances[i].speaker for i in members}))} ({len(members)})"
            for side, members in (("test", fold.test), ("validation", fold.validation))
        )
        yield f"fold {k:<4}  {', '.join(sides)}, training the others ({len(fold.train)})"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="smoke", help=f"one of: {', '.join(CORPORA)} (default: smoke)")
    parser.add_argument("--root", help="folder of the corpus (default: data/DATASET)")
    parser.add_argument("--cache", default="cache", help="folder of the computed features (default: cache)")
    parser.add_argument("--json", help="write the index to this file")
    options = parser.parse_args(argv)
    try:
        root, utterances = read_corpus(options.dataset, options.root)
        parts = folds(utterances)
        store = load(root, utterances, cache=options.cache, name=options.dataset)
        print(*describe(options.dataset, utterances, parts, store), sep="\n")
        if options.json:
            fold_of = {i: k for k, fold in enumerate(parts) for i in fold.test}
            rows = [
                {"path": u.path.relative_to(root).as_posix(), "label": u.label, "speaker": u.speaker, "fold": fold_of.get(i)}
                for i, u in enumerate(utterances)
            ]
            Path(options.json).write_text(json.dumps({"dataset": options.dataset, "utterances": rows}, indent=1) + "\n")
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
