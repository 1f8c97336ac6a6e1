"""Speech emotion corpora in, standardisable MFCC windows out.

    python features.py                                                  # generates the smoke test and indexes it
    python features.py --dataset emodb --root /data/emodb               # what is there: counts, speakers, folds, minutes
    python features.py --dataset iemocap --root /data/IEMOCAP --protocol paper --json index.json
    python features.py --dataset csv --root mine.csv                    # one's own corpus: path,label,speaker[,split]

A corpus is a function that yields `Utterance`s, and a row of `CORPORA`. `folds` turns them into speaker-independent
folds. `load` computes the windows once and keeps them on disk:

    wav -> mono, 16 kHz -> 8-second windows -> MFCC (128, 512) -> max over 4 frames -> (F, T) = (128, 128), float16
"""

import argparse
import csv
import functools
import hashlib
import io
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Callable

import numpy as np
import scipy.signal
import torch
import torchaudio
from scipy.io import wavfile

try:
    import fcntl
except ImportError:  # Windows has no such lock
    fcntl = None

CLASSES = ("angry", "happy", "neutral", "sad")
UNKNOWN = "Unknown"  # MSP-Podcast's name for speakers that it does not tell apart


class InputError(Exception):
    """Something that a user gave cannot be used. The message says what was found, what was expected, what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# Reading what lies in a corpus' folder


@dataclass(frozen=True)
class Utterance:
    path: Path  # None where a label has no recording
    label: str  # the corpus' own code, until read_corpus puts the name of the class there
    speaker: str
    group: str = None  # the unit that the folds hold out: a speaker, a session, ...; None: read_corpus makes groups
    split: str = None  # train, validation, test..., of a corpus that has an official split


def below(root, name, depth=4, folders=False):
    """Files (or folders) whose name matches the regular expression `name`, each name once, sorted. `depth`: how many
    folders below the root are looked into; the default is two for the folder that marks a corpus, two for what the free
    corpora have in it. Hidden names (AppleDouble `._x.wav`, `.DS_Store`) are passed over."""
    found = {}
    for folder, inner, files in os.walk(root, followlinks=True):
        inner[:] = sorted(f for f in inner if not f.startswith("."))
        for file in inner if folders else sorted(files):
            if not file.startswith(".") and re.fullmatch(name, file, re.IGNORECASE):
                found.setdefault(file.lower(), Path(folder, file))
        if len(Path(folder).relative_to(root).parts) >= depth:
            inner.clear()
    return [found[file] for file in sorted(found)]


def lines(path):
    """Lines of a label file, with either line ending, in UTF-8 or else in latin-1."""
    raw = Path(path).read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def rows(path, *columns):
    """Rows of a CSV as dicts, names of columns in lower case, everything stripped. `columns` must be there."""
    try:
        reader = csv.DictReader(lines(path))
        there, table = [name.strip().lower() for name in reader.fieldnames or []], list(reader)
    except csv.Error as error:
        raise InputError(f"{path} is not a CSV ({error})") from None
    missing = [name for name in columns if name not in there]
    if missing:
        raise InputError(f"{path} has no column {', '.join(missing)}; found {','.join(there) or 'nothing'}, expected {','.join(columns)}")
    for row in table:
        yield {name.strip().lower(): (value or "").strip() for name, value in row.items() if name is not None}


# ---------------------------------------------------------------------------------------------------------------------
# Corpora


def index_emodb(root):
    """`03a01Wa.wav`: speaker 03, text a01, emotion W (Wut, anger), version a. A is Angst: fear, not anger."""
    for path in below(root, r"\d\d[a-z]\d\d[WFNTAEL][a-z]?\.wav"):
        yield Utterance(path, path.name[5].upper(), path.name[:2], group=path.name[:2])


def index_ravdess(root):
    """`03-01-05-01-02-01-18.wav`: audio only, speech, emotion 05, intensity, statement, repetition, actor 18."""
    for path in below(root, r"03-01(-\d\d){5}\.wav"):
        emotion, actor = path.name[6:8], path.name[18:20]
        first = (int(actor) - 1) // 4 * 4 + 1
        yield Utterance(path, emotion, actor, group=f"{first:02}-{first + 3:02}")


def index_crema_d(root):
    """`1001_DFA_ANG_XX.wav`: actor, sentence, emotion, level."""
    for path in below(root, r"1\d{3}_[A-Z]{3}_[A-Z]{3}_\w+\.wav"):
        actor, _, emotion, _ = path.stem.upper().split("_", 3)
        k = min((int(actor) - 1001) // 18, 4)
        yield Utterance(path, emotion, actor, group=f"{1001 + 18 * k}-{(1018, 1036, 1054, 1072, 1091)[k]}")


def index_iemocap(root):
    """Label files hold `[6.2901 - 8.2357]<TAB>Ses01F_impro01_F000<TAB>neu<TAB>[2.5, 2.5, 2.5]`. The first letter is the
    actor who wears the markers, the last one the actor who speaks."""
    turn = r"Ses0([1-5])[FM]_(?:impro0\d[ab]?|script0\d_\db?)_([FM])\d{3}"
    for session in below(root, r"Session[1-5]", depth=2, folders=True):
        wavs = {path.stem: path for path in below(session / "sentences" / "wav", turn + r"\.wav", depth=2)}
        for path in below(session / "dialog" / "EmoEvaluation", r"Ses.*\.txt", depth=0):  # below it: single raters
            for line in lines(path):
                fields = line.split("\t")
                match = line.startswith("[") and len(fields) > 2 and re.fullmatch(turn, fields[1].strip())
                if match:
                    speaker = match[1] + match[2]
                    yield Utterance(wavs.get(fields[1].strip()), fields[2].strip(), speaker, group=match[1])


def index_msp_improv(root):
    """Label files hold `UTD-IMPROV-S01A-F02-R-FF01.avi; A; A:3.333333; ...`: sentence 01, intended anger, speaker F02,
    who is of session 2, condition R; the raters say A. Then a line for each rater, which begins otherwise."""
    name = r"-IMPROV-S\d\d[AHSN]-([FM])(0[1-6])-[PRST]-[FM][FM]\d\d"
    for text in below(root, r"evalua?tion\.txt", depth=3)[:1]:
        wavs = {path.stem.upper(): path for path in below(root, "MSP" + name + r"\.wav", depth=9)}
        for line in lines(text):
            fields = [field.strip() for field in line.split(";")]
            match = re.fullmatch("UTD" + name + r"\.avi", fields[0], re.IGNORECASE)
            if match and len(fields) > 1:
                speaker = match[1].upper() + match[2]
                yield Utterance(wavs.get("MSP" + fields[0][3:-4].upper()), fields[1].upper(), speaker, group=f"session {int(match[2])}")


def index_msp_podcast(root):
    """`FileName,EmoClass,EmoAct,EmoVal,EmoDom,SpkrID,Gender,Split_Set`. Wavs without a row, as those of Test3, are normal."""
    splits = {"train": "train", "validation": "validation", "development": "validation", "test1": "test1", "test2": "test2"}
    for table in below(root, r"labels_con[sc]ensus\.csv", depth=3)[:1]:
        wavs = {path.name.lower(): path for path in below(root, r"MSP-PODCAST_.*\.wav", depth=9)}
        for row in rows(table, "filename", "emoclass", "spkrid", "split_set"):
            split = splits.get(row["split_set"].lower())
            if split:
                speaker = UNKNOWN if row["spkrid"].lower() in ("", "unknown") else row["spkrid"]
                yield Utterance(wavs.get(row["filename"].lower()), row["emoclass"].upper(), speaker, split=split)


def index_csv(file):
    """One's own corpus: `path,label,speaker` and perhaps `split`; paths are relative to the file."""
    if not file.is_file():
        raise InputError(f"no file {file}; csv wants one with the columns path,label,speaker and perhaps split, named with --root FILE")
    table = list(rows(file, "path", "label", "speaker"))
    if not table:
        raise InputError(f"{file} has a header and no row; expected one for each recording")
    official = any(row.get("split") for row in table)
    for row in table:
        for column in ("path", "label", "speaker"):
            if not row[column]:
                raise InputError(f"{file}: the row of {row['path'] or 'an unnamed file'} has no {column}; every row needs one")
        if official and row["split"].lower() not in ("train", "validation", "test"):
            raise InputError(f"{file}: unknown split {row['split']!r} of {row['path']}; known: train, validation, test")
    missing = [row["path"] for row in table if not os.path.isfile(file.parent / row["path"])]  # Path's own raises for some names
    if missing:
        raise InputError(f"{file} names {len(missing)} files that are not there: {listed(missing)}; looked for them from {file.parent}")
    for row in table:
        yield Utterance(file.parent / row["path"], row["label"], row["speaker"], split=row["split"].lower() if official else None)


def generate_smoke(root, there):
    """The corpus of the first minute: voiced sounds, not speech. A train of pulses through four resonances, with a
    melody, a loudness, a tempo and a brightness that depend on the emotion, and a pitch and a vocal tract that depend
    on the speaker, written as EMO-DB writes its files. It shows that everything runs; it says nothing about speech. `there()`: it is."""
    if there():
        return
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "lock", "w") as alone:
        if fcntl:
            fcntl.flock(alone, fcntl.LOCK_EX)  # until it is closed: the second of two processes waits, and finds it there
        if not there():
            make_smoke(root)


def make_smoke(root):
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
            for text in range(1, 8):
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


def paper_iemocap(utterances):
    """Improvised turns; excited does not count as happy; pairs of speakers from neighbouring sessions are held out."""
    for u in utterances:
        if "_impro" in u.path.name and u.label != "exc":
            pair = int(u.speaker[0]) - (u.speaker[1] == "F") or 5
            yield replace(u, group=f"{pair}M {pair % 5 + 1}F")


def paper_msp_improv(utterances):
    """Turns that were read, labelled with the emotion that the actor was asked for."""
    for u in utterances:
        _, _, sentence, _, condition, _ = u.path.stem.upper().split("-")
        if condition == "R":
            yield replace(u, label=sentence[-1])


def paper_msp_podcast(utterances):
    """Train, Test1 and Test2 in one, without the speakers that are not told apart."""
    for u in utterances:
        if u.split != "validation" and u.speaker != UNKNOWN:
            yield replace(u, split=None)


@dataclass(frozen=True)
class Protocol:
    subset: Callable = iter  # utterances with the corpus' codes -> those that count, labelled and grouped
    tests: tuple = ()  # groups that test; () all of them
    at_most: int = None  # utterances on each side of a fold, drawn at random


@dataclass(frozen=True)
class Corpus:
    index: Callable  # root -> iterable of Utterance
    source: str  # where it comes from
    looked_for: str  # what the index looks for, said when nothing was found
    labels: dict = None  # code -> class; other codes are dropped; None: codes are classes
    expected: dict = None  # version -> known counts, named as in `compare_counts`
    scale: str = "small"  # default of train.py --scale
    folds: str = ""  # default of train.py --folds
    paper: Protocol = None  # the emoDARTS authors' own


def four(angry, happy, neutral, sad, **more):
    return dict(angry=angry, happy=happy, neutral=neutral, sad=sad, **more)


GERMAN = dict(W="angry", F="happy", N="neutral", T="sad", A="fear", E="disgust", L="boredom")
SPLITS = ("train", "validation", "test1", "test2")
CORPORA = {
    "smoke": Corpus(index_emodb, "generated", "generated wav files", GERMAN, {"": four(42, 42, 42, 42)}, folds="0,1"),
    "emodb": Corpus(
        index_emodb,
        "free, from the authors' site: Burkhardt et al., A Database of German Emotional Speech, Interspeech 2005",
        "files named like 03a01Wa.wav, at most four folders down",
        GERMAN,
        {"": four(127, 71, 79, 62), "2.0": {"recordings": 816}},
    ),
    "ravdess": Corpus(
        index_ravdess,
        "free, zenodo.org/records/1188976: Livingstone and Russo, PLoS ONE 13(5), 2018",
        "files named like 03-01-05-01-02-01-18.wav, at most four folders down",
        {"01": "neutral", "02": "calm", "03": "happy", "04": "sad", "05": "angry", "06": "fear", "07": "disgust", "08": "surprise"},
        {"": four(192, 192, 96, 192, recordings=1440)},
    ),
    "crema-d": Corpus(
        index_crema_d,
        "free, github.com/CheyneyComputerScience/CREMA-D: Cao et al., IEEE Transactions on Affective Computing 5(4), 2014",
        "files named like 1001_DFA_ANG_XX.wav, at most four folders down",
        dict(ANG="angry", DIS="disgust", FEA="fear", HAP="happy", NEU="neutral", SAD="sad"),
        {"": four(1271, 1271, 1087, 1271, recordings=7442)},
    ),
    "iemocap": Corpus(
        index_iemocap,
        "licensed, sail.usc.edu/iemocap",
        "folders Session1 to Session5, at most two folders down, with dialog/EmoEvaluation/*.txt and sentences/wav in each",
        dict(ang="angry", hap="happy", exc="happy", neu="neutral", sad="sad", fru="frustrated", fea="fear", sur="surprise", dis="disgust"),
        {"": four(1103, 1636, 1708, 1084, recordings=10039)},
        scale="paper",
        paper=Protocol(paper_iemocap),
    ),
    "msp-improv": Corpus(
        index_msp_improv,
        "licensed, from the MSP lab at UT Dallas",
        "Evalution.txt or Evaluation.txt, at most three folders down, and MSP-IMPROV-*.wav",
        dict(A="angry", H="happy", N="neutral", S="sad"),
        {"": four(792, 2644, 3477, 885, recordings=8438)},
        scale="paper",
        paper=Protocol(paper_msp_improv, tests=("session 1", "session 2", "session 3", "session 5")),
    ),
    "msp-podcast": Corpus(
        index_msp_podcast,
        "licensed, from the MSP lab at UT Dallas",
        "labels_consensus.csv or labels_concensus.csv, at most three folders down, and MSP-PODCAST_*.wav",
        dict(A="angry", H="happy", N="neutral", S="sad", U="surprise", F="fear", D="disgust", C="contempt"),
        {
            "1.8": dict(zip(SPLITS, (28601, 4772, 9304, 3483))),
            "1.11": dict(zip((f"{split} of any label" for split in SPLITS), (84030, 19815, 30647, 14815))),
            "2.0": dict(zip((f"{split} of any label" for split in SPLITS), (169190, 34399, 46294, 14822))),
        },
        scale="paper",
        paper=Protocol(paper_msp_podcast, at_most=10000),
    ),
    "csv": Corpus(index_csv, "your own", "the files that it names"),
}


def listed(names, most=5):
    """The first few of many names, for a message."""
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def compare_counts(dataset, utterances):
    """Compares all labelled recordings of a corpus, whatever classes and protocol are asked for, with the known version
    that is nearest. -> (text with both numbers, whether they agree)."""
    corpus, found = CORPORA[dataset], Counter(recordings=len(utterances))
    for u in utterances:
        found[f"{u.split} of any label"] += 1
        if corpus.labels and corpus.labels.get(u.label) in CLASSES:
            found.update((corpus.labels[u.label], u.split))
    if not corpus.expected:
        return f"found {len(utterances)} recordings", True
    version, known = min(corpus.expected.items(), key=lambda item: sum(abs(found[name] - n) for name, n in item[1].items()))
    both = [", ".join(f"{numbers[name]} {name}" for name in known) for numbers in (found, known)]
    return f"found {both[0]}; expected {both[1]}" + (f" (version {version})" if version else ""), both[0] == both[1]


def grouped(utterances):
    """Groups for a corpus without any: each of up to ten speakers, or five sets of speakers of about equal size."""
    sizes = Counter(u.speaker for u in utterances)
    group = {speaker: speaker for speaker in sizes}
    if len(sizes) > 10:
        filled = dict.fromkeys("12345", 0)
        for speaker, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
            group[speaker] = min(filled, key=filled.get)
            filled[group[speaker]] += size
    return [replace(u, group=group[u.speaker]) for u in utterances]


def disjoint(utterances):
    """Of a corpus with an official split: drops what would put a known speaker on two sides, the test sets first."""
    rank = {"validation": 1, "train": 2}  # any test set: 0
    side = {}
    for u in utterances:
        side[u.speaker] = min(rank.get(u.split, 0), side.get(u.speaker, 2))
    return [u for u in utterances if u.split is None or u.speaker == UNKNOWN or rank.get(u.split, 0) == side[u.speaker]]


@dataclass(frozen=True)
class Listing:
    """A corpus as it was found."""

    dataset: str
    protocol: str
    root: Path
    classes: tuple  # names of the classes, sorted
    utterances: list  # of Utterance, sorted by path
    counts: str  # what was found and what was expected

    def name(self, utterance):
        """Path relative to the root, where it is below it."""
        path = utterance.path
        return (path.relative_to(self.root) if path.is_relative_to(self.root) else path).as_posix()


def read_corpus(dataset, root=None, classes="four", protocol="standard", strict=False):
    """-> Listing. Warns when recordings are missing or the counts are not the known ones; with `strict` raises.

    Raises InputError for an unknown dataset, choice of classes or protocol, and for a root at which nothing is found.
    """
    known = {"dataset": CORPORA, "classes": ("four", "all"), "protocol": ("standard", "paper")}
    for what, value in (("dataset", dataset), ("classes", classes), ("protocol", protocol)):
        if value not in known[what]:
            raise InputError(f"unknown {what} {value!r}; known: {', '.join(known[what])}")
    corpus = CORPORA[dataset]
    if protocol == "paper" and not corpus.paper:
        raise InputError(f"{dataset} has no protocol 'paper'; these have: {', '.join(d for d in CORPORA if CORPORA[d].paper)}")
    root = Path(root or Path("data", dataset))
    if dataset == "smoke":
        generate_smoke(root, lambda: len(list(corpus.index(root))) == sum(corpus.expected[""].values()))
    labelled = list(corpus.index(root))
    recorded = sorted((u for u in labelled if u.path), key=lambda u: u.path)
    if not recorded:
        there = f"it holds {listed(sorted(p.name for p in root.iterdir())) or 'nothing'}" if root.is_dir() else "no such folder"
        if labelled:
            there = f"{len(labelled)} labels, and not one of their recordings"
        raise InputError(
            f"no utterance of {dataset} in {root} ({there}); looked for {corpus.looked_for}. "
            f"{dataset} is {corpus.source}. Put it there, or name its folder with --root DIR"
        )
    counts, agree = compare_counts(dataset, recorded)
    warn = [] if agree else [f"{dataset}: {counts}"]
    if len(recorded) < len(labelled):
        warn.append(f"{dataset}: {len(labelled) - len(recorded)} of {len(labelled)} labels have no recording in {root}; they are left out")
    if warn and strict:
        raise InputError("; ".join(warn))
    for text in warn:
        print(f"warning: {text}", file=sys.stderr)
    labels = corpus.labels or {u.label: u.label for u in recorded}
    keep = CLASSES if classes == "four" and corpus.labels else tuple(labels.values())
    subset = corpus.paper.subset if protocol == "paper" else iter
    utterances = [replace(u, label=labels[u.label]) for u in subset(recorded) if labels.get(u.label) in keep]
    if dataset != "csv":  # one's own file can be mended, and is refused; a corpus is as it is
        before, utterances = len(utterances), disjoint(utterances)
        if len(utterances) < before:
            print(f"warning: {dataset}: {before - len(utterances)} utterances of the training and validation sets are left out, "
                  "as their speakers are in another set too", file=sys.stderr)  # fmt: skip
    if any(u.group is None and u.split is None for u in utterances):
        utterances = grouped(utterances)
    names = tuple(sorted({u.label for u in utterances}))
    if len(names) < 2:
        raise InputError(f"{root}: found {len(utterances)} utterances of {listed(names) or 'no class'}; expected at least two classes")
    names = CLASSES if keep == CLASSES else names  # four are four, whatever a part of a corpus holds
    return Listing(dataset, protocol, root if root.is_dir() else root.parent, names, utterances, counts)


@dataclass(frozen=True)
class Fold:
    """Indices into the list of utterances. No speaker is on two of the three sides."""

    train: list
    validation: list
    test: list
    name: str  # of the group, or of the official set, that tests


def folds(listing, without=()):
    """One fold for each group, in sorted order: the group tests, the next one validates, all others train; of a corpus
    with an official split, one for each of its test sets. `without`: utterances to leave out, such as `Store.bad`."""
    protocol = CORPORA[listing.dataset].paper if listing.protocol == "paper" else Protocol()
    part = {i: u.split or u.group for i, u in enumerate(listing.utterances) if i not in without}
    names = sorted(set(part.values()))
    if any(u.split for u in listing.utterances):
        plan = [(("train",), "validation", test) for test in names if test.startswith("test")]
    else:
        plan = [(set(names) - {test, validation}, validation, test) for test, validation in zip(names, names[1:] + names[:1])]
        plan = [sides for sides in plan if sides[2] in (protocol.tests or names)]
    if not plan or len(names) < 3:
        raise InputError(f"found {len(names)} part(s) of {listing.dataset}: {listed(names)}; a fold needs three: to train, validate, test")
    made = []
    for k, (train, validation, test) in enumerate(plan):
        sides = [[i for i in part if part[i] in side] for side in (train, (validation,), (test,))]
        for s, side in enumerate(sides):
            if protocol.at_most and len(side) > protocol.at_most:
                sides[s] = sorted(random.Random(f"fold {k}, side {s}").sample(side, protocol.at_most))
        made.append(Fold(*sides, test))
        check_fold(listing.utterances, made[k], k)
    return made


def check_fold(utterances, fold, k=0):
    """Raises InputError where a side is empty or a known speaker is on two sides."""
    side_of = {}
    for side in ("train", "validation", "test"):
        members = getattr(fold, side)
        if not members:
            raise InputError(f"fold {k} has no {side} utterance; every fold needs all of train, validation and test")
        for i in members:
            speaker = utterances[i].speaker
            if speaker != UNKNOWN and side_of.setdefault(speaker, side) != side:
                raise InputError(f"fold {k}: speaker {speaker} is in {side_of[speaker]} and in {side}; a speaker must be on one side only")


# ---------------------------------------------------------------------------------------------------------------------
# Features

RATE, FFT, HOP, POOL = 16000, 1024, 250, 4  # Hz; samples (64 ms), samples (15.6 ms); frames that one maximum is taken of
FRAME = HOP * POOL / RATE  # seconds between two columns of the map


@dataclass(frozen=True)
class Settings:
    """Everything that the values of the features depend on, beside the recordings."""

    coefficients: int = 128  # MFCCs, of 128 mel bands; of log-mel the bands themselves
    window: float = 8.0  # seconds
    padding: str = "repeat"  # of utterances shorter than a window: "repeat" the utterance, or "zero"
    kind: str = "mfcc"  # or "log-mel": the logarithmic mel spectrum, of which MFCCs are the cosine transform

    def __post_init__(self):
        if self.kind not in ("mfcc", "log-mel"):
            raise InputError(f"unknown kind of features {self.kind!r}; known: mfcc, log-mel")
        if not 1 <= self.coefficients <= 128:  # with more, the lowest mel bands lie between two points of the spectrum
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
    if not os.path.isfile(path):  # a pipe would be waited for
        raise InputError(f"{path}: no such file")
    content = Path(path).read_bytes()  # scipy would take memory for as many samples as a file announces
    if content.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: a git-lfs stub, not audio; run `git lfs pull` in the corpus")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            rate, samples = wavfile.read(io.BytesIO(content))
    except (ValueError, TypeError, EOFError, UnboundLocalError, ArithmeticError, MemoryError, struct.error) as error:  # as scipy has them
        raise InputError(f"{path}: not a readable wav file ({error})") from None
    for warning in said:
        if "EOF" in str(warning.message):
            raise InputError(f"{path}: truncated; copy it again from the corpus")
    if samples.size == 0:
        raise InputError(f"{path}: holds no samples")
    if not 1000 <= rate <= 1_000_000:
        raise InputError(f"{path}: has a rate of {rate} Hz, expected 1,000 to 1,000,000")
    if samples.dtype.kind == "u":
        samples = (samples.astype(np.float32) - 128) / 128
    elif samples.dtype.kind == "i":  # scipy gives 24 bits as the upper ones of 32
        samples = samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min)
    if not np.abs(samples).max() < 1e9:  # not true of NaN
        raise InputError(f"{path}: holds samples that are not finite")
    if samples.ndim == 2:  # (samples, channels)
        samples = samples.mean(axis=1)
    if rate != RATE:
        ratio = Fraction(RATE, rate).limit_denominator(1000)  # the filter is as long as these numbers are large
        samples = scipy.signal.resample_poly(samples, ratio.numerator, ratio.denominator)
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


@functools.cache
def transform(settings):
    """-> a function (window,) -> (F, T) = settings.shape, both torch.Tensor.

    The values are those of torchaudio.transforms.MFCC (of MelSpectrogram and AmplitudeToDB for log-mel) in 0.6 of its
    time (no square root that is squared again). Windows go through one by one: torchaudio clamps a batch at 80 dB below
    the loudest of its windows.
    """
    mel = dict(n_fft=FFT, hop_length=HOP, n_mels=128 if settings.kind == "mfcc" else settings.coefficients)
    mfcc = torchaudio.transforms.MFCC(RATE, settings.coefficients, log_mels=False, melkwargs=mel)
    hann, mel_bands = mfcc.MelSpectrogram.spectrogram.window, mfcc.MelSpectrogram.mel_scale.fb

    def compute(window):
        spectrum = torch.stft(window, FFT, HOP, window=hann, return_complex=True).T  # (POOL * T + 1, FFT / 2 + 1)
        power = spectrum.real.square() + spectrum.imag.square()
        frames = mfcc.amplitude_to_DB(power @ mel_bands)  # (POOL * T + 1, bands)
        frames = frames @ mfcc.dct_mat if settings.kind == "mfcc" else frames  # (POOL * T + 1, F)
        return frames[:-1].unflatten(0, (-1, POOL)).amax(dim=1).T  # (F, T); the frame left out is centred on the end

    return compute


@dataclass
class Store:
    """The windows of a corpus. Utterance i has the windows first[i] .. first[i + 1] - 1."""

    features: np.ndarray  # (windows, F, T) float16, memory-mapped (copy on write, as torch wants it; nobody writes)
    first: np.ndarray  # (utterances + 1,)
    seconds: np.ndarray  # (utterances,)
    bad: dict  # utterance -> why it has no windows; empty unless such are skipped

    def windows_of(self, utterances):
        """Indices of utterances -> (indices of their windows, and for each window its place in `utterances`)."""
        counts = self.first[1:] - self.first[:-1]
        window = np.concatenate([np.arange(self.first[i], self.first[i + 1]) for i in utterances])
        return window, np.repeat(np.arange(len(utterances)), counts[utterances])


STORED = np.dtype("<f2")  # half the disk of float32; off by at most 1/2048 of a value
CHUNK, POOLED = 32, 2000  # recordings that are computed at a time; from how many on worker processes are worth their start


def compute_chunk(paths, settings):
    """What a worker does. -> (windows as bytes, for each path [number of windows, seconds, why there are none])."""
    maps, about = [], []
    for path in paths:
        try:
            samples = read_wav(path)
        except (InputError, OSError) as error:
            about.append([0, 0.0, str(error)])
            continue
        cut = windows(samples, settings)
        maps += [transform(settings)(torch.from_numpy(window)).numpy().astype(STORED).tobytes() for window in cut]
        about.append([len(cut), len(samples) / RATE, None])
    return b"".join(maps), about


def start_worker():
    """One thread each; and no worker outlives the process that started it, however that one ends. Ctrl-C is for that one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def computed(chunks, settings, workers):
    """`compute_chunk` of each, in order. Few are computed here, as starting a worker takes seconds."""
    if workers == 1 or len(chunks) * CHUNK < POOLED:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield from map(compute_chunk, chunks, [settings] * len(chunks))
        finally:
            torch.set_num_threads(threads)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker)
    try:
        yield from pool.map(compute_chunk, chunks, [settings] * len(chunks))
    except BrokenProcessPool:
        raise InputError("a worker process was killed, most likely for want of memory; the same command goes on from here") from None
    finally:
        pool.shutdown(cancel_futures=True)


def header(windows, settings):
    """Of the .npy file. numpy leaves room for the number of windows to grow, so that its length is always the same."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": STORED.str, "fortran_order": False, "shape": (windows, *settings.shape)})
    return file.getvalue()


def build(folder, paths, settings, workers, skip_bad, progress):
    """Computes the windows in `folder`.part and renames it at the end. Chunks are appended to features.npy, and then a
    line to the journal, so that a run that was killed goes on after the journal's last whole line. -> {utterance: why
    it has no windows}; if there are any and they are not to be skipped, nothing is renamed."""
    part = folder.with_name(folder.name + ".part")
    part.mkdir(parents=True, exist_ok=True)
    for name in ("features.npy", "journal"):
        (part / name).touch()
    with open(part / "features.npy", "r+b") as features, open(part / "journal", "r+b") as journal:
        if fcntl:
            fcntl.flock(journal, fcntl.LOCK_EX)  # until it is closed: a second run with the same settings waits here
        if folder.exists():
            return {}
        size, position, done = len(header(0, settings)), 0, []
        room = features.seek(0, os.SEEK_END)
        for line in journal.readlines():
            try:
                chunk = json.loads(line if line.endswith(b"\n") else b"")
                size_then = size + sum(n for n, _, _ in chunk) * math.prod(settings.shape) * STORED.itemsize
                ok = all(type(n) is int and n >= 0 and type(s) is float and type(why) in (str, type(None)) for n, s, why in chunk)
            except (ValueError, TypeError, RecursionError):
                break  # cut off in the middle, or no journal
            if not ok or size_then > room or len(done) + len(chunk) > len(paths) or not skip_bad and any(why for _, _, why in chunk):
                break  # windows that did not reach the disk, or files that may be better by now
            size, position = size_then, position + len(line)
            done += chunk
        journal.seek(position)
        journal.truncate()
        features.truncate(size)
        features.seek(size)
        left = paths[len(done) :]
        chunks, started = [left[k : k + CHUNK] for k in range(0, len(left), CHUNK)], time.time()
        for n, (maps, about) in enumerate(computed(chunks, settings, workers), start=1):
            features.write(maps)
            features.flush()
            journal.write(json.dumps(about).encode() + b"\n")
            journal.flush()
            done += about
            progress(f"features {len(done)}/{len(paths)}, {(time.time() - started) / n * (len(chunks) - n):.0f} s left")
        bad = {i: why for i, (_, _, why) in enumerate(done) if why}
        if not bad or skip_bad and len(bad) < len(paths):
            features.seek(0)
            features.write(header(sum(n for n, _, _ in done), settings))
            features.flush()
            os.fsync(features.fileno())  # whole before it has its name
            about = {"windows": [n for n, _, _ in done], "seconds": [s for _, s, _ in done], "bad": bad}
            (part / "store.json").write_text(json.dumps(about))
            part.rename(folder)
            (folder / "journal").unlink()
        return bad


def stamp(path):
    """Size and time of change; None for a file that is not to be had, such as a link to nowhere."""
    try:
        about = path.stat()
        return about.st_size, about.st_mtime_ns
    except OSError:
        return None


def load(listing, settings=Settings(), cache="cache", workers=None, skip_bad=False, progress=lambda text: None):
    """-> Store. Computes the features once; later calls find them in `cache`, under a key that covers the settings,
    the files (names, sizes, times of change) and torchaudio's version. Files that cannot be used are an InputError that
    names them all; with `skip_bad` they are in Store.bad."""
    paths = [u.path for u in listing.utterances]
    files = [(listing.name(u), stamp(u.path)) for u in listing.utterances]
    key = json.dumps([2, torchaudio.__version__, asdict(settings), files])
    folder = Path(cache, f"{listing.dataset}-{hashlib.sha256(key.encode()).hexdigest()[:12]}")
    bad = {} if folder.exists() else build(folder, paths, settings, workers or os.cpu_count(), skip_bad, progress)
    if folder.exists():
        try:
            about = json.loads((folder / "store.json").read_text())
            first = np.concatenate([[0], np.cumsum(np.array(about["windows"], dtype=int))])
            seconds, bad = np.array(about["seconds"], dtype=float), {int(i): str(why) for i, why in about["bad"].items()}
            features = np.load(folder / "features.npy", mmap_mode="c", allow_pickle=False)
            ok = features.dtype == STORED and features.shape == (first[-1], *settings.shape)
            ok = ok and len(first) - 1 == len(seconds) == len(paths) and bad.keys() == set(np.flatnonzero(np.diff(first) < 1))
        except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, MemoryError):
            ok = False
        if not ok:
            raise InputError(f"{folder} does not hold the features of {len(paths)} utterances; delete it to have them computed again")
    if bad and not (skip_bad and len(bad) < len(paths)):
        said = f"{len(bad)} of {len(paths)} recordings cannot be used; repair them, or go on without them with --skip-bad:"
        raise InputError("\n  ".join([said, *bad.values()]))
    return Store(features, first, seconds, bad)


# ---------------------------------------------------------------------------------------------------------------------


def describe_folds(listing, parts):
    for k, fold in enumerate(parts):
        sides = (
            f"{side} {listed(sorted({listing.utterances[i].speaker for i in members}))} ({len(members)})"
            for side, members in (("test", fold.test), ("validation", fold.validation))
        )
        yield f"fold {k:<4}  holds out {fold.name}: {', '.join(sides)}, training {len(fold.train)}"


def describe(listing, parts, store):
    """The lines that `python features.py` prints."""
    counts = Counter(u.label for u in listing.utterances)
    speakers = sorted({u.speaker for u in listing.utterances} - {UNKNOWN})
    unknown = sum(u.speaker == UNKNOWN for u in listing.utterances)
    yield (
        f"{listing.dataset}, protocol {listing.protocol}: {len(listing.utterances)} utterances, "
        f"{store.seconds.sum() / 60:.1f} minutes, {len(store.features)} windows"
    )
    yield f"corpus    {listing.counts}"
    yield "classes   " + ", ".join(f"{counts[c]} {c}" for c in listing.classes)
    yield f"speakers  {len(speakers)}: {listed(speakers, 24)}"
    if unknown:
        yield f"unknown   {unknown} utterances of speakers that are not told apart, on whatever sides they are"
    yield from describe_folds(listing, parts)
    if store.bad:
        yield f"skipped   {len(store.bad)} recordings that cannot be used:"
        yield from (f"  {why}" for why in store.bad.values())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="smoke", help=f"one of: {', '.join(CORPORA)} (default: smoke)")
    parser.add_argument("--root", help="folder of the corpus, or the file of csv (default: data/DATASET)")
    parser.add_argument("--cache", default="cache", help="folder of the computed features (default: cache)")
    parser.add_argument("--classes", default="four", help="four, or all that the corpus labels; of a csv always all (default: four)")
    parser.add_argument("--protocol", default="standard", help="standard, or paper: the emoDARTS authors' own (default: standard)")
    parser.add_argument("--strict", action="store_true", help="refuse a corpus with other counts than the known ones")
    parser.add_argument("--skip-bad", action="store_true", help="go on without recordings that cannot be used")
    parser.add_argument("--workers", type=int, help="processes that compute (default: one a core)")
    parser.add_argument("--json", help="write the index to this file")
    parser.add_argument("--benchmark", action="store_true", help="compute the features afresh, on one core, and say how long it takes")
    options = parser.parse_args(argv)
    try:
        if options.workers is not None and options.workers < 1:
            raise InputError(f"--workers is {options.workers}, expected at least 1")
        listing = read_corpus(options.dataset, options.root, options.classes, options.protocol, options.strict)
        folds(listing)  # what cannot be divided is refused before any work
        show = sys.stderr.isatty()
        store = load(
            listing, cache=options.cache, workers=options.workers, skip_bad=options.skip_bad,
            progress=lambda text: show and print(f"\r\033[K{text}", end="", file=sys.stderr),
        )  # fmt: skip
        if show:
            print("\r\033[K", end="", file=sys.stderr)
        parts = folds(listing, store.bad)
        if options.benchmark:
            with tempfile.TemporaryDirectory() as cache:
                wall, cpu = time.perf_counter(), time.process_time()
                seconds = load(listing, cache=cache, workers=1, skip_bad=options.skip_bad).seconds.sum()
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            print(f"benchmark {wall:.2f} s, {seconds / cpu:,.0f} times real time a core")
        print(*describe(listing, parts, store), sep="\n")
        if options.json:
            fold_of = {i: k for k, fold in enumerate(parts) for i in fold.test}
            index = [
                {"path": listing.name(u), "label": u.label, "speaker": u.speaker, "fold": fold_of.get(i), "split": u.split}
                for i, u in enumerate(listing.utterances)
            ]
            about = {"dataset": listing.dataset, "protocol": listing.protocol, "classes": listing.classes, "utterances": index}
            Path(options.json).write_text(json.dumps(about, indent=1) + "\n")
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
