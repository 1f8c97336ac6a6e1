"""Speech emotion corpora in, windows of MFCCs or of log-mel bands out.

    python features.py                                      # generates the smoke test and says what is in it
    python features.py --dataset emodb --root /data/emodb   # what is there: counts, speakers, folds, minutes
    python features.py --dataset csv --root mine.csv        # one's own corpus: path,label,speaker[,split]

A corpus' folder -> utterances -> folds: `read_corpus`, `folds`. A wav file -> windows -> store on disk: `load`.

    wav -> mono, 16 kHz -> 8-second windows -> MFCC (128, 512) -> max over 4 frames -> (F, T) = (128, 128), float16
"""

import argparse
import csv
import errno
import filecmp
import functools
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import struct
import sys
import time
import warnings
import zlib
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import scipy.signal
import torch
import torchaudio
from scipy.io import wavfile

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

CLASSES = ("angry", "happy", "neutral", "sad")
UNKNOWN = "Unknown"  # MSP-Podcast's name for speakers that it does not tell apart
RATE, FFT, HOP, POOL = 16000, 1024, 250, 4  # Hz; samples (64 ms); samples (15.6 ms); frames that make one column
FRAME = HOP * POOL / RATE  # seconds between two columns of the map
STORED = np.dtype("<f2")  # half the disk of float32; off by at most 1/2048 of a value


class InputError(Exception):
    """Something that a user gave cannot be used. The message says what was found, what was expected, what to do."""


def listed(names, most=5):
    """The first few of many names, for a message."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def open_output():
    """From here on the standard output says what it cannot say in other words, and is there even if it was closed."""
    if sys.stdout is None or sys.stdout.closed:
        sys.stdout = open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


@contextmanager
def lock(path, wait=True):
    """`with lock(path, wait=False) as mine`: locks a file, which it makes and leaves there. `mine` is False if another
    process holds the lock and is not waited for; True where the system has no locks. A dead process' lock is free."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        mine = True
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            mine = False
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL):
                raise
            warn_once(f"{path} cannot be locked on this file system; start no second process in this folder")
        yield mine


@functools.cache
def warn_once(text):
    print(f"warning: {text}", file=sys.stderr)


def write(file, content):
    """Writes a text, or what the function `content` writes: all of it or, when the process dies, nothing."""
    part = file.with_name(file.name + ".part")
    with open(part, "wb") as out:
        content(out) if callable(content) else out.write(content.encode(errors="surrogateescape"))
        out.flush()
        os.fsync(out.fileno())
    os.replace(part, file)


# A corpus' folder -> utterances --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Utterance:
    path: Path  # None where a label has no recording
    label: str  # the corpus' own code, until read_corpus puts the name of the class there
    speaker: str
    group: str = None  # the unit that the folds hold out: a speaker, a session, ...; None: read_corpus makes groups
    split: str = None  # train, validation, test..., of a corpus that has an official split
    paper: tuple = None  # (label, group) in the emoDARTS authors' own protocol; None: not in it


def below(root, name, depth=4, folders=False):
    """Files (or folders) named as the regular expression says, sorted, from at most `depth` folders down. Hidden ones
    (AppleDouble `._x.wav`, `.DS_Store`) are passed over."""
    found = []
    for folder, inner, files in os.walk(root, followlinks=True):
        inner[:] = sorted(f for f in inner if not f.startswith("."))
        for file in inner if folders else sorted(files):
            if not file.startswith(".") and re.fullmatch(name, file, re.IGNORECASE):
                found.append(Path(folder, file))
        if len(Path(folder).relative_to(root).parts) >= depth:
            inner.clear()
    return sorted(found, key=lambda path: (path.name.lower(), path))


def once(paths):
    """One file of each name: of corpora whose names tell recordings apart, and of which copies hold some twice."""
    return list({path.name.lower(): path for path in reversed(paths)}.values())[::-1]


def text_of(path):
    """A text file in UTF-8, in UTF-16 with a mark at its begin, or else in latin-1; lines end with a newline."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def rows(path, *columns, **form):
    """Rows of a table as dicts, columns in lower case, all stripped, with the number of its (last) line as `line`;
    empty rows are passed over. `columns` must be there. `form`: of csv.reader"""
    reader = csv.DictReader(io.StringIO(text_of(path), newline=""), restkey="too many", restval=None, **form)
    table = []
    try:
        there = reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or []]
        if not set(columns) <= set(there):
            raise InputError(f"{path} has the columns {','.join(there)[:200] or '(none)'}; expected {','.join(columns)}")
        for row in reader:
            if any(value and (value if name == "too many" else value.strip()) for name, value in row.items()):
                fits = "too many" not in row and None not in (row[name] for name in columns)
                row = {name: (value or "").strip() for name, value in row.items() if name != "too many"}
                table.append(row | {"line": reader.line_num, "fits": fits})
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not a row of a table ({error})") from None
    return table


def index_emodb(root):
    """Files named like 03a01Wa.wav, at most four folders down (free: Burkhardt et al., Interspeech 2005).
    Speaker 03, text a01, emotion W (Wut, anger), version a. A is Angst: fear, not anger."""
    for path in once(below(root, r"\d\d[a-z]\d\d[WFNTAEL][a-z]?\.wav")):
        yield Utterance(path, path.name[5].upper(), path.name[:2], group=path.name[:2])


def index_nemo(root):
    """data.tsv, at most two folders down, and samples/*.wav beside it (free: github.com/amu-cai/nEMO)."""
    for table in below(root, r"data\.tsv", depth=2)[:1]:
        wavs = {path.name: path for path in below(table.parent / "samples", r".*\.wav", depth=0)}
        for row in rows(table, "file_id", "emotion", "speaker_id", delimiter="\t", quoting=csv.QUOTE_NONE):
            yield Utterance(wavs.get(row["file_id"]), row["emotion"][:3], row["speaker_id"], group=row["speaker_id"])


def index_ravdess(root):
    """Files named like 03-01-05-01-02-01-18.wav, at most four folders down (free: zenodo.org/records/1188976).
    Audio only, speech, emotion 05, intensity, statement, repetition, actor 18. Groups of four actors."""
    for path in once(below(root, r"03-01(-\d\d){5}\.wav")):
        emotion, actor = path.name[6:8], path.name[18:20]
        first = (int(actor) - 1) // 4 * 4 + 1
        yield Utterance(path, emotion, actor, group=f"{first:02}-{first + 3:02}")


def index_crema_d(root):
    """Files named like 1001_DFA_ANG_XX.wav (free: github.com/CheyneyComputerScience/CREMA-D).
    Actor, sentence, emotion, level. Groups of 18 of the 91 actors; the last one has 19."""
    for path in once(below(root, r"1\d{3}_[A-Z]{3}_[A-Z]{3}_\w+\.wav")):
        actor, _, emotion, _ = path.stem.lower().split("_", 3)
        first = 1001 + 18 * min((int(actor) - 1001) // 18, 4)
        yield Utterance(path, emotion, actor, group=f"{first}-{1091 if first == 1073 else first + 17}")


def index_iemocap(root):
    """Folders Session1 to Session5 with dialog/EmoEvaluation/*.txt and sentences/wav (licensed: sail.usc.edu/iemocap).
    `[6.2901 - 8.2357]<TAB>Ses01F_impro01_F000<TAB>neu<TAB>[2.5, 2.5, 2.5]`: the first letter is the actor who wears the
    markers, the last one who speaks. Paper: improvised, happy without excited; 1M 2F, ..., 5M 1F are held out."""
    turn = r"Ses0([1-5])[FM]_(?:impro0\d[ab]?|script0\d_\db?)_([FM])\d{3}"
    for session in below(root, r"Session[1-5]", depth=2, folders=True):
        wavs = {path.stem: path for path in below(session / "sentences" / "wav", turn + r"\.wav", depth=2)}
        for path in below(session / "dialog" / "EmoEvaluation", r"Ses.*\.txt", depth=0):  # below it: single raters
            for line in text_of(path).split("\n"):
                fields = [field.strip() for field in line.split("\t")]
                match = len(fields) > 2 and re.fullmatch(turn, fields[1])
                if match and line.startswith("["):
                    k, gender, code = int(match[1]), match[2], fields[2]
                    first = k if gender == "M" else (k + 3) % 5 + 1
                    paper = (code, f"{first}M {first % 5 + 1}F") if "_impro" in fields[1] and code != "exc" else None
                    yield Utterance(wavs.get(fields[1]), code, f"{k}{gender}", group=str(k), paper=paper)


def index_msp_improv(root):
    """Evalution.txt or Evaluation.txt, at most three folders down, and MSP-IMPROV-*.wav (licensed: UT Dallas).
    `UTD-IMPROV-S01A-F02-R-FF01.avi; A; A:3.333333; ...`: sentence 01, intended anger, speaker F02, who is of session 2,
    condition R (read); the raters say A. Then a line for each rater. Paper: R only, with the intended emotion."""
    turn = r"-IMPROV-S\d\d([AHSN])-([FM])(0[1-6])-([PRST])-[FM][FM]\d\d"
    for text in below(root, r"evalua?tion\.txt", depth=3)[:1]:
        wavs = {path.stem.upper(): path for path in below(root, f"MSP{turn}\\.wav", depth=9)}
        for line in text_of(text).split("\n"):
            fields = [field.strip().upper() for field in line.split(";")]
            match = re.fullmatch(f"UTD{turn}\\.AVI", fields[0])
            if match and len(fields) > 1:
                intended, gender, number, condition = match.groups()
                path, group = wavs.get("MSP" + fields[0][3:-4]), f"session {int(number)}"
                paper = (intended, group) if condition == "R" else None
                yield Utterance(path, fields[1], gender + number, group=group, paper=paper)


def index_msp_podcast(root):
    """labels_con[sc]ensus.csv, at most three folders down, and MSP-PODCAST_*.wav (licensed: UT Dallas).
    Wavs without a row, as Test3's, are normal. Paper: Train, Test1 and Test2 in one, without unknown speakers."""
    known = dict(train="train", validation="validation", development="validation", test1="test1", test2="test2")
    for table in below(root, r"labels_con[sc]ensus\.csv", depth=3)[:1]:
        wavs = {path.name.lower(): path for path in below(root, r"MSP-PODCAST_.*\.wav", depth=9)}
        for row in rows(table, "filename", "emoclass", "spkrid", "split_set"):
            speaker = UNKNOWN if row["spkrid"].lower() in ("", "unknown") else row["spkrid"]
            code, split = row["emoclass"].upper(), known.get(row["split_set"].lower())
            paper = (code, None) if split != "validation" and speaker != UNKNOWN else None
            if split:
                yield Utterance(wavs.get(row["filename"].lower()), code, speaker, split=split, paper=paper)


def index_csv(file):
    """One's own corpus: `path,label,speaker` and perhaps `split`; paths are relative to the file."""
    if not file.is_file():
        raise InputError(f"no file {file}; --root FILE names one with the columns path,label,speaker and perhaps split")
    text = text_of(file)
    if "\0" in text:
        raise InputError(f"{file}, line {text[: text.index(chr(0))].count(chr(10)) + 1}: holds a NUL; save it as UTF-8")
    comma = max(",;\t", key=text.partition("\n")[0].count)  # Excel's comma depends on the country
    table = rows(file, "path", "label", "speaker", delimiter=comma, strict=True)
    if not table:
        raise InputError(f"{file} has a header and no row; expected one for each recording")
    official, seen, missing = any(row.get("split") for row in table), {}, []
    for row in table:
        path, split = file.parent / row["path"], row["split"].lower() if official else None
        where = f"{file}, line {row['line']}"
        empty = [column for column in ("path", "label", "speaker") if not row[column]]
        if not row["fits"]:
            raise InputError(f"{where}: too many or too few fields; put what holds a {comma!r} into quotes")
        if empty:
            raise InputError(f"{where}: the row of {row['path'] or 'a file'} has no {empty[0]}; every row needs one")
        if official and split not in ("train", "validation", "test"):
            raise InputError(f"{where}: unknown split {split!r} of {row['path']}; known: train, validation, test")
        if not os.path.isfile(path) and "\\" in row["path"]:  # of a Windows
            path = file.parent / row["path"].replace("\\", "/")
        missing += [row["path"]] * (not os.path.isfile(path))
        first = seen.setdefault(os.path.realpath(path), row)
        if first is not row:
            raise InputError(f"{where}: {row['path']} is also in line {first['line']}, as {first['path']}; keep one row")
        yield Utterance(path, row["label"], row["speaker"], split=split)
    if missing:
        raise InputError(f"{file} names {len(missing)} files that are not in {file.parent}: {listed(missing)}")


def index_smoke(root):
    """Voiced sounds, not speech, in files like EMO-DB's, generated where there are none: they show that all runs."""
    with lock(root / "lock"):  # the second of two processes waits, and finds it there
        if not (root / "wav").exists():
            make_smoke(root / "wav.part")
            (root / "wav.part").rename(root / "wav")
    return index_emodb(root)


def make_smoke(folder):
    """Trains of pulses through four resonances, each 90 Hz wide; usual pitch and vocal tract are the speaker's."""
    voices = {  # pitch, melody, loudness, syllables/s, spectral tilt
        "W": np.array([1.35, 0.30, 0.60, 5.5, 0.80]), "F": np.array([1.45, 0.45, 0.40, 5.0, 0.88]),
        "N": np.array([1.00, 0.12, 0.25, 4.2, 0.94]), "T": np.array([0.90, 0.06, 0.12, 3.0, 0.98]),
    }
    vowels = [[700, 1200, 2600, 3500], [400, 2000, 2600, 3500], [300, 900, 2300, 3300], [500, 1500, 2500, 3500]]  # Hz
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for speaker in range(3, 9):
        tract, usual = rng.uniform(0.85, 1.2), rng.uniform(100, 230)
        for letter, text in itertools.product(voices, range(1, 8)):
            pitch, melody, loudness, tempo = voices[letter][:4] * rng.normal(1, 0.12, 4)
            t = np.arange(int(RATE * rng.uniform(1.2, 2.6))) / RATE
            f0 = usual * pitch * (1 + melody * np.sin(2 * np.pi * (0.4 * tempo * t + rng.random())))
            pulses = (np.diff(np.floor(np.cumsum(f0) / RATE), prepend=0) > 0) + 0.02 * rng.standard_normal(len(t))
            poles = np.exp(np.pi / RATE * (2j * tract * np.array(vowels[rng.integers(4)]) - 90))
            poles = [voices[letter][4], *poles, *poles.conj()]
            sound = scipy.signal.lfilter([1], np.poly(poles).real, pulses)
            sound *= (1 - np.cos(2 * np.pi * tempo * t)) / 2  # syllables
            sound = loudness * sound / np.abs(sound).max() + 1e-3 * rng.standard_normal(len(t))
            file = folder / f"{speaker:02}a{text:02}{letter}a.wav"
            wavfile.write(file, RATE, (32767 * np.clip(sound, -1, 1)).astype(np.int16))


@dataclass(frozen=True)
class Corpus:
    index: object  # function: root -> Utterances; the first line of its docstring is said where it finds none
    labels: dict = None  # code -> class; other codes are dropped; None: codes are classes
    counts: tuple = ()  # of each known version, named as in `compare_counts`
    scale: str = "small"  # default of train.py --scale
    folds: str = ""  # default of train.py --folds
    paper: tuple = None  # groups that test in the emoDARTS authors' own protocol; (): all; None: they have none
    at_most: int = None  # utterances in its training, in its validation, in each of its test sets


GERMAN = dict(W="angry", F="happy", N="neutral", T="sad", A="fear", E="disgust", L="boredom")
LETTERS = dict(A="angry", H="happy", N="neutral", S="sad", U="surprise", F="fear", D="disgust", C="contempt")
NAMES = ("neutral", "calm", "happy", "sad", "angry", "fear", "disgust", "surprise")
NUMBERS = {f"0{n}": name for n, name in enumerate(NAMES, start=1)}
SHORT = {name[:3]: name for name in NAMES} | dict(exc="happy", fru="frustrated")  # excited counts as happy
PODCAST = (  # versions 1.8, 1.11, 2.0
    {"train": 28601, "validation": 4772, "test1": 9304, "test2": 3483},
    {"all train": 84030, "all validation": 19815, "all test1": 30647, "all test2": 14815},
    {"all train": 169190, "all validation": 34399, "all test1": 46294, "all test2": 14822},
)
IEMOCAP = dict(angry=1103, happy=1636, neutral=1708, sad=1084, recordings=10039)
IMPROV = dict(angry=792, happy=2644, neutral=3477, sad=885, recordings=8438)
IMPROV_TESTS = ("session 1", "session 2", "session 3", "session 5")
CORPORA = {
    "smoke": Corpus(index_smoke, GERMAN, (dict(angry=42, happy=42, neutral=42, sad=42),), folds="0,1"),
    "emodb": Corpus(index_emodb, GERMAN, (dict(angry=127, happy=71, neutral=79, sad=62), dict(recordings=816))),
    "nemo": Corpus(index_nemo, SHORT, (dict(angry=749, happy=749, neutral=809, sad=769, recordings=4481),)),
    "ravdess": Corpus(index_ravdess, NUMBERS, (dict(angry=192, happy=192, neutral=96, sad=192, recordings=1440),)),
    "crema-d": Corpus(index_crema_d, SHORT, (dict(angry=1271, happy=1271, neutral=1087, sad=1271, recordings=7442),)),
    "iemocap": Corpus(index_iemocap, SHORT, (IEMOCAP,), scale="paper", paper=()),
    "msp-improv": Corpus(index_msp_improv, LETTERS, (IMPROV,), scale="paper", paper=IMPROV_TESTS),
    "msp-podcast": Corpus(index_msp_podcast, LETTERS, PODCAST, scale="paper", paper=(), at_most=10000),
    "csv": Corpus(index_csv),
}


@dataclass(frozen=True)
class Listing:
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

    @functools.cached_property
    def prints(self):
        """A fingerprint of each file: its size, and a check sum of a few kB in its middle. (All of its bytes would take
        minutes at each start of a large corpus; sizes alone would not notice other recordings of the same length.)"""
        return [fingerprint(u.path) for u in self.utterances]

    @functools.cached_property
    def digest(self):
        """Of names, labels, speakers, folds and contents: the same wherever the corpus lies."""
        about = [[self.name(u), u.label, u.speaker, u.group, u.split, *p] for u, p in zip(self.utterances, self.prints)]
        return hashlib.sha256(json.dumps([self.classes, about]).encode()).hexdigest()[:16]

    def speaker(self, i):
        """Of an utterance; None of one whose speaker MSP-Podcast does not tell apart."""
        name = self.utterances[i].speaker
        return None if self.dataset == "msp-podcast" and name == UNKNOWN else name


def fingerprint(path):
    """(size, check sum of 4 kB in the middle); (0, 0) of a file that cannot be read."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(size // 2)
            return size, zlib.crc32(file.read(4096))
    except OSError:
        return 0, 0


def read_corpus(dataset, root=None, classes="four", protocol="standard", strict=False):
    """-> Listing. Warns when recordings are missing or the counts are not the known ones; with `strict` raises. Raises
    InputError for an unknown dataset, choice of classes or protocol, and for a root where nothing is found."""
    known = {"dataset": CORPORA, "classes": ("four", "all"), "protocol": ("standard", "paper")}
    for what, value in (("dataset", dataset), ("classes", classes), ("protocol", protocol)):
        if value not in known[what]:
            raise InputError(f"unknown {what} {value!r}; known: {', '.join(known[what])}")
    corpus, paper = CORPORA[dataset], protocol == "paper"
    if paper and corpus.paper is None:
        have = ", ".join(name for name in CORPORA if CORPORA[name].paper is not None)
        raise InputError(f"{dataset} has no protocol 'paper'; these have: {have}")
    root = Path(root or Path("data", dataset))
    labelled = list(corpus.index(root))
    recorded = sorted((u for u in labelled if u.path), key=lambda u: u.path)
    if not recorded:
        there = sorted(path.name for path in root.iterdir()) if root.is_dir() else ["no such folder"]
        found = f"no utterance of {dataset} in {root} (found {len(labelled)} labels, and {listed(there) or 'no file'})"
        raise InputError(f"{found}; looked for: {corpus.index.__doc__.splitlines()[0]} Put it there, or say --root DIR")
    counts, agree = compare_counts(corpus, recorded)
    odd = [] if agree else [counts]
    if len(recorded) < len(labelled):
        odd.append(f"{len(labelled) - len(recorded)} of {len(labelled)} labels have no recording in {root}")
    if odd and strict:
        raise InputError(f"{dataset}: {'; '.join(odd)}")
    labels = corpus.labels or {u.label: u.label for u in recorded}
    keep = CLASSES if classes == "four" and corpus.labels else tuple(sorted(labels.values()))
    if paper:
        recorded = [replace(u, label=u.paper[0], group=u.paper[1], split=None) for u in recorded if u.paper]
    chosen = [replace(u, label=labels[u.label]) for u in recorded if labels.get(u.label) in keep]
    utterances = disjoint(chosen) if corpus.labels else chosen  # one's own csv can be mended: `folds` refuses it
    if len(utterances) < len(chosen):
        odd.append(f"{len(chosen) - len(utterances)} utterances of speakers who are in another set too are left out")
    for text in odd:
        print(f"warning: {dataset}: {text}", file=sys.stderr)
    if any(not u.group and not u.split for u in utterances):
        utterances = grouped(utterances)
    names = tuple(sorted({u.label for u in utterances}))
    if len(names) < 2:
        raise InputError(f"{root}: found utterances of {listed(names) or 'no class'}; expected at least two classes")
    names = CLASSES if keep == CLASSES else names  # four are four, whatever a part of a corpus holds
    return Listing(dataset, protocol, root if root.is_dir() else root.parent, names, utterances, counts)


def compare_counts(corpus, recorded):
    """Compares all labelled recordings, whatever classes and protocol are asked for, with the nearest known version: of
    the four classes each class and each split, of any class `all` of a split. -> (text, whether they agree)"""
    found = Counter(recordings=len(recorded))
    for u in recorded:
        found[f"all {u.split}"] += 1
        if corpus.labels and corpus.labels.get(u.label) in CLASSES:
            found.update((corpus.labels[u.label], u.split))
    if not corpus.counts:
        return f"found {len(recorded)} recordings", True
    known = min(corpus.counts, key=lambda known: sum(abs(found[name] - n) for name, n in known.items()))
    there, expected = (", ".join(f"{counts[name]} {name}" for name in known) for counts in (found, known))
    return f"found {there}; expected {expected}", there == expected


def grouped(utterances):
    """Makes groups: each of up to ten speakers, or five sets of speakers of about equal size."""
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
    rank = {"validation": 1, "train": 2}  # any test set, and a group: 0
    kept = {}
    for u in utterances:
        kept[u.speaker] = min(rank.get(u.split, 0), kept.get(u.speaker, 2))
    return [u for u in utterances if u.speaker == UNKNOWN or rank.get(u.split, 0) == kept[u.speaker]]


# Utterances -> folds -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Fold:
    """Indices into the list of utterances. No known speaker is on two sides; test sets may share speakers."""
    train: list
    validation: list
    tests: dict  # name of a test set -> its indices
    name: str  # the test sets' names, joined by ", "

    def sides(self):
        """[(what to call it, its indices)]: train, validation, and test or, of several, each by its name."""
        tests = [("test" if len(self.tests) == 1 else name, members) for name, members in self.tests.items()]
        return [("train", self.train), ("validation", self.validation), *tests]


def folds(listing, without=(), chosen=None):
    """-> [Fold], one for each group: it tests, the next one validates, all others train. Of a corpus with an official
    split one with all its test sets. InputError where they cannot be made. `without`: utterances to leave out; they
    change no fold's number. A fold that they leave without a side is an InputError if it is `chosen` (None: all are)."""
    corpus, paper = CORPORA[listing.dataset], listing.protocol == "paper"
    part = {i: u.split or u.group for i, u in enumerate(listing.utterances)}
    names = sorted(set(part.values()))
    plan = [(validation, [test]) for test, validation in zip(names, names[1:] + names[:1])]
    if any(u.split for u in listing.utterances):
        plan = [("validation", [name for name in names if name.startswith("test")])]
    elif paper and corpus.paper:
        plan = [(validation, tests) for validation, tests in plan if tests[0] in corpus.paper]
    if len(names) < 3 or not plan:
        raise InputError(f"found {len(names)} part(s): {listed(names)}; a fold needs three: to train, validate, test")
    at_most, made = paper and corpus.at_most or len(part), []
    for k, (validation, tests) in enumerate(plan):
        train = [i for i in part if part[i] != validation and part[i] not in tests]
        sides = [train, *([i for i in part if part[i] == name] for name in (validation, *tests))]
        for s, side in enumerate(sides):
            sides[s] = sorted(random.Random(f"fold {k}, side {s}").sample(side, min(at_most, len(side))))
        check_fold(listing, Fold(sides[0], sides[1], dict(zip(tests, sides[2:])), ", ".join(tests)), k)
        train, validation, *rest = ([i for i in side if i not in without] for side in sides)
        made.append(Fold(train, validation, dict(zip(tests, rest)), ", ".join(tests)))
        if chosen is None or k in chosen:
            check_sides(listing, made[k], k)
    return made


def check_fold(listing, fold, k):
    """Raises InputError where a known speaker or the same recording is on two sides."""
    side_of, found = {}, {}
    for side, members in fold.sides():
        for i in members:
            who = listing.speaker(i)
            other = who is not None and side_of.setdefault(who, side)
            if other and other != side and not {other, side} <= set(fold.tests):
                raise InputError(f"fold {k}: speaker {who} is in {other} and in {side}; expected on one side only")
            for j, there in found.setdefault(listing.prints[i], []) if listing.prints[i][0] else ():
                if there != side and not {there, side} <= set(fold.tests) and same_file(listing, i, listing, j):
                    names = [listing.name(listing.utterances[n]) for n in (j, i)]
                    raise InputError(f"fold {k}: {names[0]}, in {there}, and {names[1]}, in {side}, are the same "
                                     "recording; keep one of them")
            found.setdefault(listing.prints[i], []).append((i, side))


def same_file(listing, i, other, j):
    """Only asked of files with one fingerprint."""
    paths = listing.utterances[i].path, other.utterances[j].path
    return os.path.samefile(*paths) or filecmp.cmp(*paths, shallow=False)


def check_sides(listing, fold, k):
    """Raises InputError where a side is empty, or a class has nothing to be trained on."""
    missing = set(listing.classes) - {listing.utterances[i].label for i in fold.train}
    lacks = [f"no {side} utterance" for side, members in fold.sides() if not members]
    lacks += [f"no training utterance of class {name}" for name in sorted(missing)]
    if lacks:
        raise InputError(f"fold {k} has {lacks[0]} that can be used; repair the recordings, or leave this fold out "
                         "with --folds")


def check_apart(listing, members, other):
    """Raises InputError where a recording of the Listing `other`, a second test corpus, is among these members."""
    trained = {}
    for i in members:
        trained.setdefault(listing.prints[i], []).append(i)
    for j, p in enumerate(other.prints):
        for i in trained.get(p, []) if p[0] else ():
            if same_file(listing, i, other, j):
                raise InputError(f"{other.name(other.utterances[j])} of {other.dataset}, which is to be tested on, is "
                                 f"{listing.name(listing.utterances[i])} of {listing.dataset}, which is trained on")


def describe_folds(listing, parts):
    """`parts`: number -> Fold"""
    for k, fold in parts.items():
        train, validation, *tests = fold.sides()
        said = []
        for side, members in (*tests, validation):
            speakers = sorted({listing.utterances[i].speaker for i in members})
            said.append(f"{side} {listed(speakers)} ({len(members)})")
        yield f"fold {k:<4}  holds out {fold.name}: {', '.join(said)}, training {len(fold.train)}"


# A wav file -> windows -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Settings:
    """Everything that the values of the features depend on, beside the recordings."""
    coefficients: int = 128  # MFCCs, of 128 mel bands; of log-mel the bands themselves
    window: float = 8.0  # seconds
    kind: str = "mfcc"  # or "log-mel": the logarithmic mel spectrum, of which MFCCs are the cosine transform

    def __post_init__(self):
        if self.kind not in ("mfcc", "log-mel"):
            raise InputError(f"found features {self.kind!r}; expected mfcc or log-mel")
        if not 1 <= self.coefficients <= 128:  # with more, the lowest mel bands lie between two points of the spectrum
            raise InputError(f"found {self.coefficients} coefficients; expected 1 to 128, the number of mel bands")
        if not FRAME <= self.window <= 600 or self.window / FRAME % 1:
            raise InputError(f"found a window of {self.window} s; expected a multiple of {FRAME} s, at most 600 s")

    @classmethod
    def named(cls, name, **more):
        """`Settings.named("log-mel-64", window=4.0)`"""
        match = re.fullmatch("(mfcc|log-mel)-([1-9][0-9]{0,3})", name)
        if not match:
            raise InputError(f"unknown features {name!r}; expected a kind and a number, as in log-mel-64 or mfcc-128")
        return cls(int(match[2]), kind=match[1], **more)

    @property
    def name(self):
        return f"{self.kind}-{self.coefficients}"

    @property
    def shape(self):
        return self.coefficients, round(self.window / FRAME)  # (F, T) of a window


def wav_chunks(file, path):
    """An open wav file -> (content of its format chunk, where its samples begin, how many bytes they have). The RIFF
    header's size is not believed, and that of the samples only as far as it can be true."""
    end, at, form = file.seek(0, os.SEEK_END), 12, None
    file.seek(0)
    head = file.read(12)
    if head.startswith(b"version http"):
        raise InputError(f"{path}: a git-lfs stub, not audio; run `git lfs pull` in the corpus")
    if head[:4] not in (b"RIFF", b"RF64") or head[8:] != b"WAVE":
        raise InputError(f"{path}: not a wav file; expected it to begin with RIFF and WAVE")
    while at + 8 <= end:
        file.seek(at)
        name, size = struct.unpack("<4sI", file.read(8))
        if name == b"fmt ":
            form = file.read(min(size, 64))
        if name == b"data":
            if form is None:
                raise InputError(f"{path}: has no format chunk before its samples")
            left = end - at - 8
            if size >= 0x7FFF0000 or (size == 0 and not chunks_follow(file, at + 8, end)):
                size = left  # what wrote it could not go back, or broke off: to the end of the file
            if size > left:
                raise InputError(f"{path}: truncated, {left} of {size} bytes are there; copy it again from the corpus")
            return form, at + 8, size
        at += 8 + size
        if size % 2:  # a byte of padding follows, which some leave out
            file.seek(at)
            at += file.read(1) == b"\0"
    raise InputError(f"{path}: has no {'samples' if form else 'format chunk'}; expected the chunks fmt and data")


def chunks_follow(file, at, end):
    """Whether well-formed chunks fill a file from here to its end."""
    while at + 8 <= end:
        file.seek(at)
        name, size = struct.unpack("<4sI", file.read(8))
        if not name.isascii() or not name.decode().isprintable():
            return False
        at += 8 + size + size % 2
    return at in (end, end + 1)


def wav_format(form, path):
    """Content of a format chunk -> (samples/s, bytes of a frame)."""
    if len(form) < 16:
        raise InputError(f"{path}: its format chunk has {len(form)} bytes, expected at least 16")
    _, channels, rate, _, block, _ = struct.unpack("<HHIIHH", form[:16])
    if not channels or not block or not 1000 <= rate <= 1_000_000:
        raise InputError(f"{path}: says {channels} channels, {block} bytes a frame, {rate} Hz; expected some, at 1,000 to "
                         "1,000,000 Hz")
    return rate, block


def read_wav(path):
    """-> float32 samples in -1..1, mono, 16 kHz. Raises InputError, with the reason, for what is not such a file."""
    if not os.path.isfile(path):  # a pipe would be waited for
        raise InputError(f"{path}: no such file")
    with open(path, "rb") as file:
        form, at, size = wav_chunks(file, path)
        rate, block = wav_format(form, path)
        file.seek(at)
        data = file.read(size // block * block)
    if not data:
        raise InputError(f"{path}: holds no samples")
    chunks = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(data)) + data
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rate, samples = wavfile.read(io.BytesIO(b"RIFF" + struct.pack("<I", len(chunks)) + chunks))
    except Exception as error:  # scipy raises what comes
        raise InputError(f"{path}: cannot be decoded ({error}); expected PCM or float samples") from None
    if samples.dtype.kind == "u":
        samples = (samples.astype(np.float32) - 128) / 128
    elif samples.dtype.kind == "i":  # scipy gives 24 bits as the upper ones of 32
        samples = samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min)
    if not np.abs(samples).max() < 1e9:  # not true of NaN
        raise InputError(f"{path}: holds samples that are not finite")
    samples = samples.reshape(len(samples), -1).mean(axis=1)  # over the channels
    if rate != RATE:
        ratio = Fraction(RATE, rate).limit_denominator(1000)  # the filter is as long as these numbers are large
        samples = scipy.signal.resample_poly(samples, ratio.numerator, ratio.denominator)
    return samples.astype(np.float32)


def lengths(listing, window):
    """Windows of `window` s and seconds of each utterance, (utterances,) each, from the wav files' headers alone."""
    seconds = np.zeros(len(listing.utterances))
    for i, u in enumerate(listing.utterances):
        try:
            with open(u.path, "rb") as file:
                form, _, size = wav_chunks(file, u.path)
            rate, block = wav_format(form, u.path)
            seconds[i] = size // block / rate
        except (InputError, OSError):
            pass  # `load` says what cannot be used
    return np.ceil(seconds / window).clip(min=1).astype(int), seconds


def windows(samples, settings):
    """(samples,) -> (W, window). A short utterance is padded; a long one's last window ends with it, and overlaps."""
    size = round(settings.window * RATE)
    if len(samples) < size:
        samples = np.resize(samples, size)  # repeats the samples until they fill the window
    starts = [*range(0, len(samples) - size, size), len(samples) - size]
    return np.stack([samples[start : start + size] for start in starts])


@functools.cache
def transform(settings):
    """-> a function of tensors, (window,) -> (F, T). One window at a time: torchaudio clamps a batch at 80 dB below the
    loudest of its windows."""
    mel = dict(n_fft=FFT, hop_length=HOP)
    if settings.kind == "mfcc":
        frames = torchaudio.transforms.MFCC(RATE, settings.coefficients, log_mels=False, melkwargs=mel | {"n_mels": 128})
    else:
        power = torchaudio.transforms.MelSpectrogram(RATE, n_mels=settings.coefficients, **mel)
        frames = torch.nn.Sequential(power, torchaudio.transforms.AmplitudeToDB(top_db=80))

    def map_of(window):
        x = frames(window)[:, :-1]  # (F, POOL * T), without the frame that is centred on the window's end
        return x.unflatten(1, (-1, POOL)).amax(dim=2)  # (F, T)

    return map_of


# Windows -> a store on disk ------------------------------------------------------------------------------------------
@dataclass
class Store:
    """The windows of a corpus. Utterance i has the windows first[i] .. first[i + 1] - 1."""
    features: np.ndarray  # (windows, F, T) float16, memory-mapped (copy on write, as torch wants it; nobody writes)
    first: np.ndarray  # (utterances + 1,)
    seconds: np.ndarray  # (utterances,)
    bad: dict  # utterance -> why it has no windows; empty unless such are skipped

    def windows_of(self, utterances):
        """Indices of utterances -> (indices of their windows, and for each window its place in `utterances`)."""
        window = np.concatenate([np.arange(self.first[i], self.first[i + 1]) for i in utterances])
        return window, np.repeat(np.arange(len(utterances)), np.diff(self.first)[utterances])


def load(listing, settings=Settings(), cache="cache", skip_bad=False, progress=lambda text: None):
    """-> Store. Computes the features once and finds them later, by the settings and the files' names, sizes and times.
    Recordings that cannot be used are an InputError that names them all or, with `skip_bad`, in Store.bad."""
    paths = [u.path for u in listing.utterances]
    about = [path.stat() if os.access(path, os.R_OK) else None for path in paths]
    files = [(listing.name(u), a and (a.st_size, a.st_mtime_ns)) for u, a in zip(listing.utterances, about)]
    key = json.dumps([4, torchaudio.__version__, asdict(settings), files])
    folder = Path(cache, f"{listing.dataset}-{hashlib.sha256(key.encode()).hexdigest()[:12]}")
    if not (folder / "index.json").exists():  # a store that is whole may lie where nothing can be written
        with lock(folder / "lock"):  # a second process with the same settings waits, and finds the features
            if not (folder / "index.json").exists():
                compute(folder, paths, settings, progress)
    try:
        index = json.loads((folder / "index.json").read_text())
        count, seconds = np.array(index["windows"], dtype=int), np.array(index["seconds"], dtype=float)
        shape = (int(count.sum()), *settings.shape)
        whole = (folder / "features").stat().st_size == math.prod(shape) * STORED.itemsize
        if not whole or not len(count) == len(seconds) == len(paths) or (count < 0).any():
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise InputError(f"{folder} does not hold the features of {len(paths)} utterances; delete it") from None
    bad = {}
    for i in np.flatnonzero(count == 0).tolist():
        bad[i] = compute_one(paths[i], settings)[2] or f"{paths[i]}: could not be read at first; delete {folder}"
    if bad and not (skip_bad and len(bad) < len(paths)):
        said = f"{len(bad)} of {len(paths)} recordings cannot be used; repair them, or go on without with --skip-bad:"
        raise InputError("\n  ".join([said, *bad.values()]))
    if not bad or shape[0]:
        features = np.memmap(folder / "features", STORED, "c", shape=shape)
    return Store(features, np.cumsum([0, *count]), seconds, bad)


def compute(folder, paths, settings, progress):
    """Computes the features of all recordings into a file that gets its name when it is whole, and then an index, which
    says that it is."""
    windows, seconds, said = [], [], time.monotonic()
    started = said

    def compute_all(out):
        nonlocal said
        for n, path in enumerate(paths, start=1):
            maps, length, _ = compute_one(path, settings)
            out.write(maps.numpy().astype(STORED).tobytes())
            windows.append(len(maps))
            seconds.append(length)
            if time.monotonic() > said + 2 or n == len(paths):
                said = time.monotonic()
                progress(f"features {n}/{len(paths)}, {(said - started) * (len(paths) / n - 1):.0f} s left")

    write(folder / "features", compute_all)
    write(folder / "index.json", json.dumps({"windows": windows, "seconds": seconds}))


def compute_one(path, settings):
    """-> (W, F, T) float16, seconds, None; no windows, 0, why for a file that cannot be used."""
    try:
        samples = read_wav(path)
    except (InputError, OSError) as error:
        return torch.empty(0), 0.0, str(error)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same bits, however many there are
    maps = [transform(settings)(torch.from_numpy(window)) for window in windows(samples, settings)]
    torch.set_num_threads(threads)
    return torch.stack(maps).half(), len(samples) / RATE, None


def describe(listing, parts, store):
    """The lines that `python features.py` prints."""
    counts = Counter(u.label for u in listing.utterances)
    known = [listing.speaker(i) for i in range(len(listing.utterances))]
    speakers, unknown = sorted(set(known) - {None}), known.count(None)
    sizes = f"{len(listing.utterances)} utterances, {store.seconds.sum() / 60:.1f} minutes, {store.first[-1]} windows"
    yield f"{listing.dataset}, protocol {listing.protocol}: {sizes}"
    yield f"corpus    {listing.counts}"
    yield "classes   " + ", ".join(f"{counts[c]} {c}" for c in listing.classes)
    yield f"speakers  {len(speakers)}: {listed(speakers, 24)}"
    if unknown:
        yield f"unknown   {unknown} utterances of speakers that are not told apart, on whatever sides they are"
    yield from describe_folds(listing, parts)
    if store.bad:
        yield f"skipped   {len(store.bad)} recordings that cannot be used:"
        yield from (f"  {why}" for why in store.bad.values())


def show(text=""):
    """On a terminal only: takes the place of the text before."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", default="smoke", help=f"one of: {', '.join(CORPORA)} (default: smoke)")
    add("--root", help="folder of the corpus, or the file of csv (default: data/DATASET)")
    add("--cache", default="cache", help="folder of the computed features (default: cache)")
    add("--classes", default="four", help="four, or all that the corpus labels; of a csv always all (default: four)")
    add("--protocol", default="standard", help="standard, or paper: the emoDARTS authors' own (default: standard)")
    add("--strict", action="store_true", help="refuse a corpus with other counts than the known ones")
    add("--skip-bad", action="store_true", help="go on without recordings that cannot be used")
    add("--json", help="write the index to this file")
    options = parser.parse_args(argv)
    open_output()
    try:
        listing = read_corpus(options.dataset, options.root, options.classes, options.protocol, options.strict)
        folds(listing, chosen=())  # what cannot be divided is refused before any work
        store = load(listing, cache=options.cache, skip_bad=options.skip_bad, progress=show)
        parts = folds(listing, store.bad, chosen=())
        show()
        print(*describe(listing, dict(enumerate(parts)), store), sep="\n")
        if options.json:
            index = asdict(listing) | {"folds": [asdict(fold) for fold in parts]}
            Path(options.json).write_text(json.dumps(index, default=str))
    except KeyboardInterrupt:
        print("\nstopped; the same command computes what is missing", file=sys.stderr)
        return 130
    except (InputError, OSError) as error:
        show()
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
