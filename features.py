"""Speech emotion corpora in, windows of MFCCs or of log-mel bands out.

A corpus' folder -> utterances -> folds: `read_corpus`, `folds`. A wav file -> windows -> store on disk: `load`.

    wav -> mono, 16 kHz -> 8-second windows -> MFCC (128, 512) -> max over 4 frames -> (F, T) = (128, 128), float16
"""

import csv
import errno
import filecmp
import functools
import hashlib
import io
import itertools
import json
import os
import random
import re
import struct
import sys
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
RATE, FFT, HOP, POOL = 16000, 1024, 250, 4  # Hz; samples (64 ms); samples (15.6 ms); frames that make one column
FRAME = HOP * POOL / RATE  # seconds between two columns of the map
WARNED = []  # the first file that could not be locked


class InputError(Exception):
    """Something that a user gave cannot be used. The message says what was found, what was expected, what to do."""


def listed(names, most=5):
    """The first few of many names, for a message."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


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
        except OSError as error:
            mine = error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)  # of NFS
            if not mine and not isinstance(error, BlockingIOError):
                raise
            if mine and not WARNED:  # once a process: a run locks each of its folds
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


def below(root, name, depth=4, folders=False, once=False):
    """Files (or folders) named as the regular expression says, sorted, at most `depth` folders down; no hidden ones
    (AppleDouble `._x.wav`). `once`: one of each name, where names tell recordings apart and copies hold some twice."""
    found = []
    for folder, inner, files in os.walk(root, followlinks=True):
        inner[:] = sorted(f for f in inner if not f.startswith("."))
        for file in inner if folders else sorted(files):
            if not file.startswith(".") and re.fullmatch(name, file, re.IGNORECASE):
                found.append(Path(folder, file))
        if len(Path(folder).relative_to(root).parts) >= depth:
            inner.clear()
    found.sort(key=lambda path: (path.name.lower(), path))
    return list({path.name.lower(): path for path in found[::-1]}.values())[::-1] if once else found


def text_of(path):
    """A text file in UTF-8, UTF-16 or else latin-1; lines end with a newline."""
    content = path.read_bytes()
    wide = content[:2] in (b"\xff\xfe", b"\xfe\xff") and "utf-16" or content[1:2] == b"\0" and "utf-16-le"  # no mark
    for encoding in (wide or "utf-8-sig", "latin-1"):
        with suppress(UnicodeDecodeError):
            return content.decode(encoding).replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")


def rows(path, *columns, **form):
    """Rows of a table as dicts, columns in lower case, all stripped, and `line`, where each begins; empty ones, and
    Excel's `sep=;`, are passed over. `columns` must be there, once. `form`: of csv.reader"""
    reader, table, line = csv.reader(io.StringIO(text_of(path), newline=""), **form), [], 1
    try:
        for row in reader:
            fields = [field.strip() for field in row]
            if any(fields) and (table or not fields[0].lower().startswith("sep=")):
                table.append((line, fields))
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}, line {line}: not a row of a table ({error}); is a quote open?") from None
    there = [name.lower() for name in table[0][1]] if table else []
    if any(there.count(column) != 1 for column in columns):
        raise InputError(f"{path} has the columns {','.join(there)[:99] or '(none)'}; expected {','.join(columns)}")
    for line, fields in table[1:]:
        if any(fields[len(there) :]):
            raise InputError(f"{path}, line {line}: more fields than columns; put a text with a separator into quotes")
        yield dict(itertools.zip_longest(there, fields[: len(there)], fillvalue="")) | {"line": line}


def index_emodb(root):
    """Files named like 03a01Wa.wav, at most four folders down (free: Burkhardt et al., Interspeech 2005).
    Speaker 03, text a01, emotion W (Wut, anger), version a. A is Angst: fear, not anger."""
    for path in below(root, r"\d\d[a-z]\d\d[WFNTAEL][a-z]?\.wav", once=True):
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
    for path in below(root, r"03-01(-\d\d){5}\.wav", once=True):
        emotion, actor = path.name[6:8], path.name[18:20]
        first = (int(actor) - 1) // 4 * 4 + 1
        yield Utterance(path, emotion, actor, group=f"{first:02}-{first + 3:02}")


def index_crema_d(root):
    """Files named like 1001_DFA_ANG_XX.wav (free: github.com/CheyneyComputerScience/CREMA-D).
    Actor, sentence, emotion, level. Groups of 18 of the 91 actors; the last one has 19."""
    for path in below(root, r"1\d{3}_[A-Z]{3}_[A-Z]{3}_\w+\.wav", once=True):
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
            speaker = "Unknown" if row["spkrid"].lower() in ("", "unknown") else row["spkrid"]
            code, split = row["emoclass"].upper(), known.get(row["split_set"].lower())
            paper = (code, None) if split != "validation" and speaker != "Unknown" else None
            if split:
                yield Utterance(wavs.get(row["filename"].lower()), code, speaker, split=split, paper=paper)


def index_csv(file):
    """One's own corpus: `path,label,speaker` and perhaps `split`; paths are relative to the file."""
    if not file.is_file():
        raise InputError(f"no file {file}; --root FILE names one with the columns path,label,speaker and perhaps split")
    header = next((line for line in text_of(file).split("\n") if "speaker" in line.lower()), "")
    separator = max(",;\t", key=header.count)  # Excel's comma depends on the country
    table, line_of = list(rows(file, "path", "label", "speaker", delimiter=separator, strict=True)), {}
    official = any(row.get("split") for row in table)
    for row in table:
        path, split = file.parent / row["path"], row["split"].lower() if official else None
        if not os.path.isfile(path):  # perhaps it was saved on Windows
            path = file.parent / row["path"].replace("\\", "/")
        line = line_of.setdefault(os.path.realpath(path), row["line"])
        faults = {f"no {column}": not row[column] for column in ("path", "label", "speaker")} | {
            f"the split {split!r}; known: train, validation, test": split not in (None, "train", "validation", "test"),
            f"no recording, {row['path']!r} is no file in {file.parent}": not os.path.isfile(path),
            f"the recording {path.name} of line {line} once more; keep one of them": line != row["line"]}
        for fault in (fault for fault, true in faults.items() if true):
            raise InputError(f"{file}, line {row['line']}: has {fault}")
        yield Utterance(path, row["label"], row["speaker"], split=split)


def index_smoke(root):
    """Voiced sounds, not speech, in files like EMO-DB's, generated where there are none: they show that all runs."""
    with lock(root / "lock"):  # the second of two processes waits, and finds it there
        if not (root / "wav").exists():
            make_smoke(root / "wav.part")
            (root / "wav.part").rename(root / "wav")
    return index_emodb(root)


def make_smoke(folder):
    """Harmonics of a voice that rises and falls, in syllables: a class has its pitch, melody, tempo and brightness."""
    voices = dict(W=(1.5, 0.3, 5.5, 0.8), F=(1.9, 0.5, 4.0, 1.2), N=(1.0, 0.1, 3.0, 1.6), T=(0.7, 0.02, 1.5, 2.4))
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for speaker, usual in enumerate(rng.uniform(120, 180, 6), start=3):  # Hz
        for letter, text in itertools.product(voices, range(1, 5)):
            pitch, melody, tempo, tilt = voices[letter] * rng.normal(1, 0.05, 4)
            t = np.arange(int(RATE * rng.uniform(1.2, 2.6))) / RATE
            phase = 2 * np.pi * np.cumsum(usual * pitch * (1 + melody * np.sin(4 * t + rng.uniform(0, 6)))) / RATE
            sound = sum(np.sin(k * phase) / k**tilt for k in range(1, 17)) * (1 - np.cos(2 * np.pi * tempo * t))
            sound = 0.5 * sound / np.abs(sound).max() + 1e-3 * rng.standard_normal(len(t))
            wavfile.write(folder / f"{speaker:02}a{text:02}{letter}a.wav", RATE, (32767 * sound).astype(np.int16))


@dataclass(frozen=True)
class Corpus:
    index: object  # function: root -> Utterances; the first line of its docstring is said where it finds none
    labels: dict = None  # code -> class; other codes are dropped; None: codes are classes
    counts: tuple = ()  # of each known version: classes, recordings with a label
    scale: str = "small"  # default of train.py --scale
    folds: str = ""  # default of train.py --folds
    paper: tuple = None  # groups that test in the emoDARTS authors' protocol; (): all; None: they have not used it
    at_most: int = None  # utterances in its training, in its validation, in each of its test sets


GERMAN = dict(W="angry", F="happy", N="neutral", T="sad", A="fear", E="disgust", L="boredom")
LETTERS = dict(A="angry", H="happy", N="neutral", S="sad", U="surprise", F="fear", D="disgust", C="contempt")
NAMES = ("neutral", "calm", "happy", "sad", "angry", "fear", "disgust", "surprise")
NUMBERS = {f"0{n}": name for n, name in enumerate(NAMES, start=1)}
SHORT = {name[:3]: name for name in NAMES} | dict(exc="happy", fru="frustrated")  # excited counts as happy
PODCAST = ({"of four classes": 46160}, dict(recordings=149307), dict(recordings=264705))  # versions 1.8, 1.11, 2.0
IEMOCAP = dict(angry=1103, happy=1636, neutral=1708, sad=1084, recordings=10039)
IMPROV = dict(angry=792, happy=2644, neutral=3477, sad=885, recordings=8438)
CORPORA = {
    "smoke": Corpus(index_smoke, GERMAN, (dict(angry=24, happy=24, neutral=24, sad=24),), folds="0,1"),
    "emodb": Corpus(index_emodb, GERMAN, (dict(angry=127, happy=71, neutral=79, sad=62), dict(recordings=816))),
    "nemo": Corpus(index_nemo, SHORT, (dict(angry=749, happy=749, neutral=809, sad=769, recordings=4481),)),
    "ravdess": Corpus(index_ravdess, NUMBERS, (dict(angry=192, happy=192, neutral=96, sad=192, recordings=1440),)),
    "crema-d": Corpus(index_crema_d, SHORT, (dict(angry=1271, happy=1271, neutral=1087, sad=1271, recordings=7442),)),
    "iemocap": Corpus(index_iemocap, SHORT, (IEMOCAP,), scale="paper", paper=()),
    "msp-improv": Corpus(index_msp_improv, LETTERS, (IMPROV,), "paper", paper=tuple("session " + k for k in "1235")),
    "msp-podcast": Corpus(index_msp_podcast, LETTERS, PODCAST, scale="paper", paper=(), at_most=10000),
    "csv": Corpus(index_csv),
}


@dataclass(frozen=True)
class Listing:
    dataset: str
    protocol: str
    root: Path
    classes: tuple  # names of the classes, sorted; four are four, whatever a part of a corpus holds
    utterances: list  # of Utterance, sorted by path

    def name(self, utterance):
        """Path relative to the root, where it is below it."""
        path = utterance.path
        return (path.relative_to(self.root) if path.is_relative_to(self.root) else path).as_posix()

    @functools.cached_property
    def prints(self):
        """Size and check sum of 4 kB in the middle of each file; (0, 0) where it cannot be read. (All bytes would take
        minutes at each start; sizes alone would not notice other recordings of the same length.)"""
        found = [(0, 0)] * len(self.utterances)
        for i, u in enumerate(self.utterances):
            with suppress(OSError), open(u.path if os.path.isfile(u.path) else "", "rb") as file:  # not of a pipe
                size = file.seek(0, os.SEEK_END)
                file.seek(size // 2)
                found[i] = size, zlib.crc32(file.read(4096))
        return found

    @property
    def digest(self):
        """Of names, labels, speakers, folds and contents: the same wherever the corpus lies."""
        about = [(self.name(u), u.label, u.speaker, u.group, u.split, p) for u, p in zip(self.utterances, self.prints)]
        return hashlib.sha256(json.dumps([self.classes, about]).encode()).hexdigest()[:16]


def read_corpus(dataset, root=None, classes="four", protocol="standard"):
    """-> Listing. `classes`: four or all, `protocol`: standard or paper. Warns when recordings are missing or the
    counts are not the known ones. InputError for an unknown dataset, and for a root where nothing is found."""
    if dataset not in CORPORA:
        raise InputError(f"unknown dataset {dataset!r}; known: {', '.join(CORPORA)}")
    corpus, paper = CORPORA[dataset], protocol == "paper" and CORPORA[dataset].paper is not None
    root = Path(root or Path("data", dataset))
    labelled = list(corpus.index(root))
    recorded = sorted((u for u in labelled if u.path), key=lambda u: u.path)
    if not recorded:
        there = sorted(os.listdir(root)) if root.is_dir() else ["a file" if root.exists() else "no folder"]
        found = f"no utterance of {dataset} in {root} (found {len(labelled)} labels, and {listed(there) or 'no file'})"
        raise InputError(f"{found}; looked for: {corpus.index.__doc__.splitlines()[0]} Put it there, or say --root DIR")
    labels = corpus.labels or {u.label: u.label for u in recorded}
    keep = CLASSES if classes == "four" and corpus.labels else tuple(sorted(labels.values()))
    theirs = [replace(u, label=u.paper[0], group=u.paper[1], split=None) for u in recorded if u.paper]
    chosen = [replace(u, label=labels[u.label]) for u in (theirs if paper else recorded) if labels.get(u.label) in keep]
    utterances = disjoint(chosen) if corpus.labels else chosen  # one's own csv can be mended: `folds` refuses it
    found = Counter(labels.get(u.label) for u in recorded) + Counter(recordings=len(recorded))
    found["of four classes"] = sum(found[name] for name in CLASSES)
    known = min(corpus.counts or [{}], key=lambda known: sum(abs(found[name] - n) for name, n in known.items()))
    there, expected = (", ".join(f"{counts[name]} {name}" for name in known) for counts in (found, known))
    odd = {
        f"found {there}; expected {expected}": there != expected,
        f"{len(labelled) - len(recorded)} of {len(labelled)} labels have no recording": len(recorded) < len(labelled),
        f"{len(chosen) - len(utterances)} utterances of speakers who are in another set too are left out":
            len(utterances) < len(chosen)}
    for text in (text for text, true in odd.items() if true):
        print(f"warning: {dataset} in {root}: {text}", file=sys.stderr)
    if any(not u.group and not u.split for u in utterances):
        utterances = grouped(utterances)
    names = tuple(sorted({u.label for u in utterances}))
    if len(names) < 2:
        raise InputError(f"{root}: found utterances of {listed(names) or 'no class'}; expected at least two classes")
    names = CLASSES if keep == CLASSES else names
    return Listing(dataset, protocol, root if root.is_dir() else root.parent, names, utterances)


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
    return [u for u in utterances if u.speaker == "Unknown" or rank.get(u.split, 0) == kept[u.speaker]]


# Utterances -> folds -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Fold:
    """Indices into the list of utterances. No known speaker is on two sides; test sets may share speakers."""
    train: list
    validation: list
    tests: dict  # name of a test set -> its indices

    def sides(self):
        """{what to call it: its indices}: train, validation, and test or, of several, each by its name."""
        tests = {"test": m for m in self.tests.values()} if len(self.tests) == 1 else self.tests
        return {"train": self.train, "validation": self.validation, **tests}


def folds(listing, without=(), chosen=None, validate=True):
    """-> [Fold], one for each group: it tests, the next one validates (if it shall `validate`), all others train. Of a
    corpus with an official split one with all its test sets. InputError where they cannot be made. `without`: what to
    leave out; no fold's number changes. A fold that they leave without a side is one if it is `chosen` (None: all)."""
    corpus, paper = CORPORA[listing.dataset], listing.protocol == "paper"
    part = {i: u.split or u.group for i, u in enumerate(listing.utterances)}
    names = sorted(set(part.values()))
    plan = [(validation, [test]) for test, validation in zip(names, names[1:] + names[:1])]
    if any(u.split for u in listing.utterances):
        plan = [("validation", [name for name in names if name.startswith("test")])]
    elif paper and corpus.paper:
        plan = [(validation, tests) for validation, tests in plan if tests[0] in corpus.paper]
    if len(names) < 2 + validate or not plan or not plan[0][1]:
        raise InputError(f"found part(s) {listed(names)}; expected train, {'validation, ' * validate}test")
    at_most, made = paper and corpus.at_most or len(part), []
    for k, (validation, tests) in enumerate(plan):
        kept = (validation, *tests) if validate else tests  # from the training
        sides = [[i for i in part if part[i] not in kept]]
        sides += [[i for i in part if part[i] == name and name in kept] for name in (validation, *tests)]
        for n, side in enumerate(sides):
            sides[n] = sorted(random.Random(f"fold {k}, side {n}").sample(side, min(at_most, len(side))))
        whole = Fold(*sides[:2], dict(zip(tests, sides[2:])))
        check_apart(k, *((side, listing, members) for side, members in whole.sides().items()))
        sides = [[i for i in side if i not in without] for side in sides]
        made.append(Fold(*sides[:2], dict(zip(tests, sides[2:]))))
        empty = [side for side, members in made[k].sides().items() if not members]
        lacks = [f"{side} utterance" for side in empty if validate or side != "validation"]
        there, trained = ({listing.utterances[i].label for i in fold.train} for fold in (whole, made[k]))
        lost = ({*listing.classes} if chosen else there) - trained
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
            if u.speaker != "Unknown" or listing.dataset != "msp-podcast":  # who is not told apart there
                found[f"speaker {u.speaker}"] = side_of.setdefault((id(listing), u.speaker), side)
            for path, other in recordings.setdefault(print_, []):
                if other != side and (path == u.path or print_[0] and filecmp.cmp(path, u.path, shallow=False)):
                    found[f"one recording, {path.name} and {u.path.name},"] = other
            recordings[print_].append((u.path, side))
            for what, other in found.items():
                if other != side and other in ("train", "validation"):
                    raise InputError(f"fold {k}: {what} is in {other} and in {side}; expected on one side only")


# A wav file -> windows -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Settings:
    """Everything that the values of the features depend on, beside the recordings."""
    features: str = "mfcc-128"  # mfcc-N: N coefficients of 128 mel bands; log-mel-N: N bands, in decibels
    window: float = 8.0  # seconds

    def __post_init__(self):
        known = re.fullmatch("(mfcc|log-mel)-([1-9][0-9]?|1[01][0-9]|12[0-8])", self.features)
        if not known or not FRAME <= self.window <= 600 or self.window / FRAME % 1:
            raise InputError(f"found {self.features!r} of {self.window} s; expected mfcc-N or log-mel-N, N from 1 to "
                             f"128, and a window of a multiple of {FRAME} s, at most 600 s")

    @property
    def shape(self):
        return int(self.features.rpartition("-")[2]), round(self.window / FRAME)  # (F, T) of a window


def chunks(content, at):
    """(name, begin of its content, size as it says) of each chunk from byte `at` on; padding may lack, or be not 0."""
    while at + 8 <= len(content):
        name, size = struct.unpack_from("<4sI", content, at)
        yield name, at + 8, size
        at += 8 + size
        at += size % 2 and (content[at : at + 1] == b"\0" or content[at + 1 : at + 5] in (b"data", b"fmt "))


def read_wav(path):
    """-> float32 samples in -1..1, mono, 16 kHz. Raises InputError, with the reason, for what is not such a file. The
    RIFF header's size is not believed, that of the samples only as far as it can be true."""
    if not os.path.isfile(path):  # a pipe would be waited for
        raise InputError(f"{path}: no such file")
    content, form = Path(path).read_bytes(), b""
    if content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        stub = "a git-lfs stub; run `git lfs pull` in the corpus" if content.startswith(b"version http") else ""
        raise InputError(f"{path}: {stub or 'not a wav file; expected one that begins with RIFF and WAVE'}")
    for name, at, size in chunks(content, 12):
        if name == b"data":
            break
        if name == b"fmt ":
            form = content[at : at + size]
    else:
        raise InputError(f"{path}: has no data chunk, and so no samples")
    left = len(content) - at
    if size == 0:  # an empty recording, if all that follows are whole chunks
        names = (x.isascii() and x.decode().isprintable() and a + n <= len(content) for x, a, n in chunks(content, at))
        size = 0 if all(names) else left
    if size >= 0x7FFF0000:
        size = left  # what wrote it could not go back, or broke off: to the end of the file
    if size > left:
        raise InputError(f"{path}: truncated, {left} of {size} bytes are there; copy it again from the corpus")
    _, channels, rate, _, block, bits = struct.unpack("<HHIIHH", form[:16].ljust(16, b"\0"))
    if not channels or channels * bits > 8 * block or not block or not 1000 <= rate <= 1_000_000 or size < block:
        raise InputError(f"{path}: has {channels} channels of {bits} bits, {block} bytes a frame, {rate} Hz, {size} "
                         "bytes of sound; expected some, at 1,000 to 1,000,000 Hz")
    data = content[at : at + size // block * block]  # a frame that broke off is left out
    whole = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(data)) + data
    try:
        _, samples = wavfile.read(io.BytesIO(b"RIFF" + struct.pack("<I", len(whole)) + whole))
    except Exception as error:  # scipy raises what comes
        raise InputError(f"{path}: cannot be decoded ({error}); expected PCM or float samples") from None
    if samples.dtype.kind == "u":
        samples = (samples.astype(np.float32) - 128) / 128
    elif samples.dtype.kind == "i":  # scipy gives 24 bits as the upper ones of 32
        samples = samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min)
    if not np.abs(samples).max() < 1e9:  # not true of NaN
        raise InputError(f"{path}: holds samples that are not finite")
    samples = samples.reshape(len(samples), -1).mean(axis=1)  # over the channels
    ratio = Fraction(RATE, rate).limit_denominator(1000)  # the filter is as long as these numbers are large
    return scipy.signal.resample_poly(samples, ratio.numerator, ratio.denominator).astype(np.float32)  # 1: a copy


def windows(samples, settings):
    """(samples,) -> (W, window). A short utterance is repeated; a long one's last window ends with it, and overlaps."""
    size = round(settings.window * RATE)
    samples = np.resize(samples, max(size, len(samples)))  # repeats them until they fill the window
    starts = [*range(0, len(samples) - size, size), len(samples) - size]
    return np.stack([samples[start : start + size] for start in starts])


@functools.cache
def transform(settings):
    """-> a function of tensors, (window,) -> (F, frames)"""
    mel, n = dict(n_fft=FFT, hop_length=HOP), settings.shape[0]
    if settings.features.startswith("mfcc"):
        return torchaudio.transforms.MFCC(RATE, n, log_mels=False, melkwargs=mel | {"n_mels": 128})
    power = torchaudio.transforms.MelSpectrogram(RATE, n_mels=n, **mel)
    return torch.nn.Sequential(power, torchaudio.transforms.AmplitudeToDB(top_db=80))


def maps_of(samples, settings):
    """(samples,) -> (W, F, T) float16. One window at a time: torchaudio clamps a batch at 80 dB below the loudest of
    its windows. With one thread: the same bits, however many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    frames = [transform(settings)(torch.from_numpy(window)) for window in windows(samples, settings)]
    torch.set_num_threads(threads)
    x = torch.stack(frames)[:, :, :-1]  # (W, F, POOL * T), without the frame that is centred on the window's end
    return x.unflatten(2, (-1, POOL)).amax(dim=3).half()


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
    """-> Store. Computes the features once and finds them later, by the settings, the listing's digest and the
    files' times. Recordings that cannot be used: an InputError that names them all or, with `skip_bad`, Store.bad."""
    paths = [u.path for u in listing.utterances]
    times = [os.path.isfile(path) and os.path.getmtime(path) for path in paths]
    key = json.dumps([5, torchaudio.__version__, asdict(settings), listing.digest, times])
    folder = Path(cache, f"{listing.dataset}-{hashlib.sha256(key.encode()).hexdigest()[:12]}")
    if not (folder / "index.json").exists():  # a store that is whole may lie where nothing can be written
        with lock(folder / "lock"):  # a second process with the same settings waits, and finds the features
            if not (folder / "index.json").exists():
                compute(folder, paths, settings, progress)
    try:
        count, seconds, why = zip(*json.loads((folder / "index.json").read_text()))
        shape = sum(count), *settings.shape
        whole = len(count) == len(paths) and (folder / "features").stat().st_size == 2 * np.prod(shape)
    except (OSError, ValueError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise InputError(f"{folder} does not hold the features of {len(paths)} utterances; delete it")
    bad = {i: f"{paths[i]}: {reason}" for i, reason in enumerate(why) if not count[i]}
    if bad and not (skip_bad and len(bad) < len(paths)):
        said = f"{len(bad)} of {len(paths)} recordings cannot be used; repair them, or go on without with --skip-bad:"
        raise InputError("\n  ".join([said, *bad.values()]))
    features = np.memmap(folder / "features", "<f2", "c", shape=shape)
    return Store(features, np.cumsum([0, *count]), np.array(seconds), bad)


def compute(folder, paths, settings, progress):
    """Writes the features of all recordings, and then an index: windows, seconds, why there are none of each."""
    index = []

    def computed(out):
        for n, path in enumerate(paths, start=1):
            try:
                samples = read_wav(path)
                maps = maps_of(samples, settings)
                out.write(maps.numpy().astype("<f2").tobytes())
                index.append((len(maps), len(samples) / RATE, None))
            except (InputError, OSError) as error:
                index.append((0, 0.0, str(error).removeprefix(f"{path}: ")))
            if n % 100 == 0 or n == len(paths):
                progress(f"features of recording {n} of {len(paths)}")

    write(folder / "features", computed)
    write(folder / "index.json", json.dumps(index))
