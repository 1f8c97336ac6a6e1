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
from contextlib import contextmanager, suppress
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
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)  # as NFS and others answer
WARNED = []  # the first file that could not be locked
STORED = np.dtype("<f2")  # half the disk of float32; off by at most 1/2048 of a value


class InputError(Exception):
    """Something that a user gave cannot be used. The message says what was found, what was expected, what to do."""


def listed(names, most=5):
    """The first few of many names, for a message."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def open_output():
    """From here on the standard output is there, even if it was closed, and what it has no letter for is escaped."""
    if sys.stdout is None or sys.stdout.closed:
        sys.stdout = open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


@contextmanager
def lock(path, wait=True):
    """`with lock(path, wait=False) as mine`: locks a file, which it makes and leaves there. `mine` is False if another
    process holds the lock and is not waited for; True where there are no locks. A dead process' lock is free."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        mine = True
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            mine = False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            if not WARNED:  # once a process: a run locks each of its folds
                print(f"warning: {path} cannot be locked ({error.strerror}); no other process is noticed; run one only",
                      file=sys.stderr)
                WARNED.append(path)
        yield mine


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
    """A text file in UTF-8, UTF-16 or else latin-1; lines end with a newline."""
    content = path.read_bytes()
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    if 0 in content[:2]:  # no mark, but the letter that a text begins with has a byte of zeros
        encoding = "utf-16-be" if content[0] == 0 else "utf-16-le"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")


def rows(path, *columns, **form):
    """Rows of a table as dicts, columns in lower case, all stripped, and `line`, where each begins; empty ones, and
    Excel's `sep=;`, are passed over. `columns` must be there, once. `form`: of csv.reader"""
    reader, there, table, line = csv.reader(io.StringIO(text_of(path), newline=""), **form), [], [], 1
    try:
        for row in reader:
            begun, line = line, reader.line_num + 1
            row = [field.strip() for field in row]
            if not any(row) or (not there and row[0].lower().startswith("sep=")):
                continue
            if there:
                if any(row[len(there) :]):
                    raise InputError(f"{path}, line {begun}: more fields than columns; put a text that holds a "
                                     "separator into quotes")
                table.append(dict(itertools.zip_longest(there, row[: len(there)], fillvalue="")) | {"line": begun})
            else:
                there = [name.lower() for name in row]
                if any(there.count(column) != 1 for column in columns):
                    break
    except csv.Error as error:
        raise InputError(f"{path}, line {line}: not a row of a table ({error}); is a quote in it that nothing "
                         "closes?") from None
    if any(there.count(column) != 1 for column in columns):
        raise InputError(f"{path} has the columns {','.join(there)[:99] or '(none)'}; expected {','.join(columns)}")
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
    header = next((line for line in text_of(file).split("\n") if "speaker" in line.lower()), "")
    separator = max(",;\t", key=header.count)  # Excel's comma depends on the country
    table, line_of, missing = rows(file, "path", "label", "speaker", delimiter=separator, strict=True), {}, []
    if not table:
        raise InputError(f"{file} has a header and no row; expected one for each recording")
    official = any(row.get("split") for row in table)
    for row in table:
        path, split = file.parent / row["path"], row["split"].lower() if official else None
        empty = [column for column in ("path", "label", "speaker") if not row[column]]
        name = " ".join(row["path"].split())  # in a message, that is one line
        if empty:
            raise InputError(f"{file}, line {row['line']}: {name or 'a file'} has no {empty[0]}; give it one")
        if official and split not in ("train", "validation", "test"):
            raise InputError(f"{file}, line {row['line']}: unknown split {split!r} of {name}; known: train, "
                             "validation, test")
        if not os.path.isfile(path):  # perhaps it was saved on Windows
            path = file.parent / row["path"].replace("\\", "/")
        missing += [name] * (not os.path.isfile(path))
        line = line_of.setdefault(os.path.realpath(path), row["line"])
        if line != row["line"]:
            raise InputError(f"{file}, lines {line} and {row['line']}: both are {name}; keep one of them")
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
        """Fingerprints of the files. (All of their bytes would take minutes at each start; sizes alone would not notice
        other recordings of the same length.)"""
        return [fingerprint(u.path) for u in self.utterances]

    @property
    def digest(self):
        """Of names, labels, speakers, folds and contents: the same wherever the corpus lies."""
        about = [(self.name(u), u.label, u.speaker, u.group, u.split, p) for u, p in zip(self.utterances, self.prints)]
        return hashlib.sha256(json.dumps([self.classes, about]).encode()).hexdigest()[:16]


def fingerprint(path):
    """Size and check sum of 4 kB in the middle; (0, 0) of a file that cannot be read."""
    if os.path.isfile(path):  # a pipe would be waited for
        with suppress(OSError), open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(size // 2)
            return size, zlib.crc32(file.read(4096))
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
    change no fold's number. A fold that they leave without a side is an InputError if it is `chosen` (None: all)."""
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
        sides = {"train": [i for i in part if part[i] not in (validation, *tests)]}
        sides |= {name: [i for i in part if part[i] == name] for name in (validation, *tests)}
        drawn = []
        for n, side in enumerate(sides.values()):
            drawn.append(sorted(random.Random(f"fold {k}, side {n}").sample(side, min(at_most, len(side)))))
        whole = Fold(*drawn[:2], dict(zip(tests, drawn[2:])), ", ".join(tests))
        check_apart(k, *((side, listing, members) for side, members in whole.sides()))
        train, valid, *rest = ([i for i in side if i not in without] for side in drawn)
        made.append(Fold(train, valid, dict(zip(tests, rest)), ", ".join(tests)))
        lacks = [f"{side} utterance" for side, members in made[k].sides() if not members]
        needed = listing.classes if chosen else {listing.utterances[i].label for i in whole.train}
        lost = set(needed) - {listing.utterances[i].label for i in train}
        lacks += [f"train utterance of class {label}" for label in sorted(lost)]
        if lacks and (chosen is None or k in chosen):
            raise InputError(f"fold {k} has no {lacks[0]} that can be used; every fold needs all of train, validation "
                             "and test, and all classes in train; repair it, or run others with --folds")
    return made


def check_apart(k, *sides):
    """Raises InputError where a known speaker of a listing, or the same recording under whatever name, is on two sides
    of fold k, of which one trains or validates. A side is (its name, Listing, members)."""
    side_of, recordings = {}, {}
    for side, listing, members in sides:
        for i in members:
            u, print_, found = listing.utterances[i], listing.prints[i], {}
            if u.speaker != UNKNOWN or listing.dataset != "msp-podcast":  # elsewhere it is a name like any other
                found[f"speaker {u.speaker}"] = side_of.setdefault((id(listing), u.speaker), side)
            for path, other in recordings.setdefault(print_, []):
                if other != side and (path == u.path or print_[0] and filecmp.cmp(path, u.path, shallow=False)):
                    found[f"one recording, {path.name} and {u.path.name},"] = other
            recordings[print_].append((u.path, side))
            for what, other in found.items():
                if other != side and other in ("train", "validation"):
                    raise InputError(f"fold {k}: {what} is in {other} and in {side}; expected on one side only")


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
        if self.kind not in ("mfcc", "log-mel") or not 1 <= self.coefficients <= 128:  # more: mel bands without a point
            raise InputError(f"found {self.kind}, {self.coefficients} coefficients; expected 1 to 128, mfcc or log-mel")
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
    def shape(self):
        return self.coefficients, round(self.window / FRAME)  # (F, T) of a window


def chunks(file, at, end):
    """(name, where its content begins, size as it says) of each chunk of a wav file, from byte `at` on."""
    while at + 8 <= end:
        file.seek(at)
        name, size = struct.unpack("<4sI", file.read(8))
        yield name, at + 8, size
        at += 8 + size
        file.seek(at)
        after = file.read(5)  # some leave the byte of padding out, to some it is not a zero
        at += size % 2 and (after[:1] == b"\0" or after[1:] in (b"data", b"fmt "))


def only_chunks(file, at, end):
    """Whether what stands from byte `at` to the end are whole chunks, as far as their names and sizes tell."""
    found = ((name.decode("latin-1"), begun + size) for name, begun, size in chunks(file, at, end))
    return all(name.isascii() and name.isprintable() and after <= end for name, after in found)


def open_wav(path):
    """-> content of a wav file's format chunk, samples/s, bytes of a frame, where the samples begin, how many bytes
    they have. The RIFF header's size is not believed, that of the samples only as far as it can be true."""
    if not os.path.isfile(path):  # a pipe would be waited for
        raise InputError(f"{path}: no such file")
    with open(path, "rb") as file:
        head, end, form, long = file.read(12), os.path.getsize(path), b"", 0
        if head.startswith(b"version http"):
            raise InputError(f"{path}: a git-lfs stub, not audio; run `git lfs pull` in the corpus")
        if head[:4] not in (b"RIFF", b"RF64") or head[8:] != b"WAVE":
            raise InputError(f"{path}: not a wav file; expected it to begin with RIFF and WAVE")
        for name, at, size in chunks(file, 12, end):
            if name == b"data":
                break
            if name == b"fmt ":
                form = file.read(min(size, 64))
            if name == b"ds64":  # RF64: the size of the samples, where 32 bits cannot say it
                long = struct.unpack("<8xQ", file.read(16).ljust(16, b"\0"))[0]
        else:
            raise InputError(f"{path}: has no data chunk, and so no samples")
        left = end - at
        if size == 0xFFFFFFFF and 0 < long < 2**62:
            size = long
        elif size >= 0x7FFF0000 or (size == 0 and not only_chunks(file, at, end)):
            size = left  # what wrote it could not go back, or broke off: to the end of the file
    if size > left:
        raise InputError(f"{path}: truncated, {left} of {size} bytes are there; copy it again from the corpus")
    _, channels, rate, _, block, bits = struct.unpack("<HHIIHH", form[:16].ljust(16, b"\0"))
    if not form:
        raise InputError(f"{path}: has no format chunk before its samples; copy it again from the corpus")
    if not channels or channels * bits > 8 * block or not block or not 1000 <= rate <= 1_000_000 or size < block:
        raise InputError(f"{path}: has {channels} channels of {bits} bits, {block} bytes a frame, {rate} Hz, {size} "
                         "bytes of sound; expected some, at 1,000 to 1,000,000 Hz")
    return form, rate, block, at, size // block * block  # a frame that broke off is left out


def read_wav(path):
    """-> float32 samples in -1..1, mono, 16 kHz. Raises InputError, with the reason, for what is not such a file."""
    form, rate, _, at, size = open_wav(path)
    with open(path, "rb") as file:
        file.seek(at)
        data = file.read(size)
    chunks = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", size) + data
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, samples = wavfile.read(io.BytesIO(b"RIFF" + struct.pack("<I", len(chunks)) + chunks))
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
        with suppress(InputError, OSError):  # `load` says what cannot be used
            _, rate, block, _, size = open_wav(u.path)
            seconds[i] = size / block / rate
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
        mel["n_mels"] = 128
        frames = torchaudio.transforms.MFCC(RATE, settings.coefficients, log_mels=False, melkwargs=mel)
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
    key = json.dumps([4, torchaudio.__version__, asdict(settings), files, listing.prints])
    folder = Path(cache, f"{listing.dataset}-{hashlib.sha256(key.encode()).hexdigest()[:12]}")
    if not (folder / "index.json").exists():  # a store that is whole may lie where nothing can be written
        with lock(folder / "lock"):  # a second process with the same settings waits, and finds the features
            if not (folder / "index.json").exists():
                compute(folder, paths, settings, progress)
    try:
        count, seconds = np.array(json.loads((folder / "index.json").read_text())).reshape(-1, 2).T
        shape = int(count.sum()), *settings.shape
        whole = len(count) == len(paths) and (folder / "features").stat().st_size == 2 * math.prod(shape)
    except (OSError, ValueError, TypeError, OverflowError, RecursionError):
        whole = False
    if not whole:
        raise InputError(f"{folder} does not hold the features of {len(paths)} utterances; delete it")
    bad = {}
    for i in np.flatnonzero(count == 0).tolist():
        bad[i] = compute_one(paths[i], settings)[2] or f"{paths[i]}: could not be read at first; delete {folder}"
    if bad and not (skip_bad and len(bad) < len(paths)):
        said = f"{len(bad)} of {len(paths)} recordings cannot be used; repair them, or go on without with --skip-bad:"
        raise InputError("\n  ".join([said, *bad.values()]))
    features = np.memmap(folder / "features", STORED, "c", shape=shape)
    return Store(features, np.cumsum([0, *count], dtype=int), seconds, bad)


def compute(folder, paths, settings, progress):
    """Writes the features of all recordings, and then an index: (windows, seconds) of each."""
    index, started = [], time.time()

    def computed(out):
        for n, path in enumerate(paths, start=1):
            maps, seconds, _ = compute_one(path, settings)
            out.write(maps.numpy().astype(STORED).tobytes())
            index.append((len(maps), seconds))
            if n % 100 == 0 or n == len(paths):
                progress(f"features {n}/{len(paths)}, {(time.time() - started) * (len(paths) / n - 1):.0f} s left")

    write(folder / "features", computed)
    write(folder / "index.json", json.dumps(index))


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
    speakers = Counter(u.speaker for u in listing.utterances)
    unknown = speakers.pop(UNKNOWN, 0) if listing.dataset == "msp-podcast" else 0
    sizes = f"{len(listing.utterances)} utterances, {store.seconds.sum() / 60:.1f} minutes, {store.first[-1]} windows"
    yield f"{listing.dataset}, protocol {listing.protocol}: {sizes}"
    yield f"corpus    {listing.counts}"
    yield "classes   " + ", ".join(f"{counts[c]} {c}" for c in listing.classes)
    yield f"speakers  {len(speakers)}: {listed(sorted(speakers), 24)}"
    if unknown:
        yield f"unknown   {unknown} utterances of speakers that are not told apart, on whatever sides they are"
    yield from describe_folds(listing, dict(enumerate(parts)))
    yield from (f"skipped   {why}" for why in store.bad.values())


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
    options = parser.parse_args(argv)
    open_output()
    try:
        listing = read_corpus(options.dataset, options.root, options.classes, options.protocol, options.strict)
        folds(listing, chosen=())  # what cannot be divided is refused before any work
        said = functools.partial(print, file=sys.stderr)
        store = load(listing, cache=options.cache, skip_bad=options.skip_bad, progress=said)
        print(*describe(listing, folds(listing, store.bad, chosen=()), store), sep="\n")
        return 0
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
