"""Speech emotion corpora in, standardised windows of MFCCs, log-mel bands or one's own frames out.

    a corpus' folder -> read_corpus: utterances -> folds: who trains, validates, tests
    wav -> read_wav: mono, 16 kHz -> windows of 8 s -> maps_of: (F, T) = (128, 128), float16
    npy -> read_frames: (frames, D) -> windows of 192 -> maps_of: (F, T) = (D, 64), float16
        -> load: a store on disk -> Data: batches (N, 1, F, T), standardised, and classes (N,)
"""

import ast
import csv
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import struct
import sys
import unicodedata
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
except ImportError:  # on Windows
    fcntl = None

CLASSES = ("angry", "happy", "neutral", "sad")
SPLITS = (None, "train", "validation", "test", "test1", "test2")  # labels of test3 are secret
RATE, FFT, HOP, POOL = 16000, 1024, 250, 4  # Hz; samples (64 ms); samples; frames of a column
FRAME = HOP * POOL / RATE  # seconds between two columns
LOUDEST = 10  # float samples beyond are whole numbers; what clips in a studio is at most a few
LEVELS = 40  # dB: no two microphones differ so, but 16 bits do that are read as 24 or 32
SOURCE = inspect.getsource(sys.modules[__name__])  # what runs, though the file may change meanwhile
nfc = functools.partial(unicodedata.normalize, "NFC")  # a letter with its accent: one character

class InputError(Exception):
    """What a user gave cannot be used: what was found, what was expected, what to do."""

@contextmanager
def naming(path):
    """What comes in the way of reading a file (disk, network, rights, memory) names it."""
    try:
        yield
    except (OSError, MemoryError) as error:
        raise InputError(f"{path}: cannot be read now ({error!r}); start again") from error

def listed(names, most=5):
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")

def warn(text):
    print(f"warning: {text}", file=sys.stderr)

warn_once = functools.cache(warn)

# A corpus' folder -> utterances ------------------------------------------------------------------
@dataclass(frozen=True)
class Utterance:
    path: Path  # None where a label has no recording
    label: str  # the corpus' own code, until read_corpus puts the name of the class there
    speaker: str
    group: str = None  # what the folds hold out: a speaker, a session; None: read_corpus makes some
    split: str = None  # train, validation, test..., of a corpus that has an official split
    paper: tuple = None  # (label, group) in the emoDARTS authors' own protocol; None: not in it
    recording: str = None  # a name that tells recordings apart, whatever folder they lie in

def below(root, pattern, depth=4, folders=False):
    """Files (or folders) of such names, not hidden, by name, then depth; each folder once."""
    found, visited, inner = [], {}, [Path(root)]
    for down in range(depth + 1):
        level, inner = sorted(inner, key=lambda path: (path.is_symlink(), path)), []
        for folder in filter(os.path.isdir, level):
            if visited.setdefault(os.path.realpath(folder), folder) is not folder:
                continue
            walk = os.walk(folder, onerror=lambda error: warn(f"a folder was left out: {error}"))
            _, names, files = next(walk, ("", [], []))
            inner += [folder / name for name in names if name[0] != "."]
            for path in [folder] if folders else map(folder.joinpath, files):
                if path.name[:1] != "." and re.fullmatch(pattern, path.name, re.IGNORECASE):
                    found.append((path.name.lower(), down, path))
    return [path for _, _, path in sorted(found)]

def by_name(paths):  # in lower case; of several files of one name the first
    return {nfc(path.name).lower(): path for path in reversed(paths)}

def single(tables):
    """The first of these files of labels, in a list. InputError where two differ."""
    if len(set(map(text_of, tables))) > 1:
        raise InputError(f"{listed([*map(str, tables)])} differ; expected one file of labels")
    return tables[:1]

def text_of(path):
    """A text file in UTF-8, UTF-16 or else latin-1; lines end with a newline."""
    content = path.read_bytes()
    wide = "utf-16-le" if content[1:2] == b"\0" else "utf-8-sig"  # without a mark
    try:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else wide)
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")

def rows(path, *columns, **how):
    """Rows of a table as dicts, and `line`, where each begins. `how`: arguments of csv.reader"""
    text, table, line = text_of(path), [], 1
    header = next((line for line in text.split("\n") if columns[-1] in line.lower()), "")
    how |= {"delimiter": max(",;\t", key=header.count)}  # Excel's depends on the country
    reader = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True, **how)
    try:
        for row in reader:
            fields = [field.strip() for field in row]
            if any(fields) and (table or not fields[0].lower().startswith("sep=")):
                table.append((line, fields))
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}, line {line}: not a row ({error}); is a quote open?") from None
    there = [name.lower() for name in table[0][1]] if table else []
    if any(there.count(column) != 1 for column in columns) or there.count("split") > 1:
        raise InputError(f"{path} has the columns {there!s:.99}; expected {[*columns]}")
    for line, fields in table[1:]:
        if any(fields[len(there) :]):
            raise InputError(f"{path}, line {line}: more fields than columns; are quotes missing?")
        yield dict(zip(there, fields + [""] * len(there))) | {"line": line}

def index_emodb(root):
    """Files named like 03a01Wa.wav, at most four folders down (free: Burkhardt et al., 2005).
    Speaker 03, text a01, emotion W (Wut, anger), version a. A is Angst: fear, not anger."""
    for path in below(root, r"\d\d[a-z]\d\d[WFNTAEL][a-z]?\.wav"):
        name = path.name.lower()
        yield Utterance(path, name[5].upper(), name[:2], name[:2], recording=name)

def index_nemo(root):
    """data.tsv, at most two folders down, and samples/*.wav beside it (free: amu-cai/nEMO)."""
    for table in single(below(root, r"data\.tsv", depth=2)):
        wavs = by_name(below(table.parent / "samples", r".*\.wav", depth=0))
        for row in rows(table, "file_id", "emotion", "speaker_id", quoting=csv.QUOTE_NONE):
            name, speaker = nfc(row["file_id"]).lower(), nfc(row["speaker_id"])
            path, emotion = wavs.get(name), row["emotion"][:3]
            yield Utterance(path, emotion, speaker, speaker, recording=name)

def index_ravdess(root):
    """Files named like 03-01-05-01-02-01-18.wav, at most four folders down (free: zenodo 1188976).
    Audio only, speech, emotion 05, intensity, statement, repetition, actor 18. Groups of four."""
    for path in below(root, r"03-01(-\d\d){5}\.wav"):
        name, actor = path.name.lower(), path.name[18:20]
        first = (int(actor) - 1) // 4 * 4 + 1
        yield Utterance(path, name[6:8], actor, f"{first:02}-{first + 3:02}", recording=name)

def index_crema_d(root):
    """Files named like 1001_DFA_ANG_XX.wav, at most four folders down (free: Cao et al., 2014).
    Actor, sentence, emotion, level. Groups of 18 of the 91 actors; the last one has 19."""
    for path in below(root, r"1\d{3}_[A-Z]{3}_[A-Z]{3}_\w+\.wav"):
        name, actor = path.name.lower(), path.name[:4]
        first = 1001 + 18 * min((int(actor) - 1001) // 18, 4)
        yield Utterance(path, name.split("_")[2], actor, str(first), recording=name)

def index_iemocap(root):
    """Folders Session1 to Session5 with dialog/EmoEvaluation/*.txt and sentences/wav (licensed).
    `[6.2901 - 8.2357]<TAB>Ses01F_impro01_F000<TAB>neu<TAB>[2.5, 2.5, 2.5]`: not F, who wears the
    markers, but the last F speaks. Paper: improvised, without excited; 1M 2F to 5M 1F held out."""
    turn = r"(Ses0([1-5])[FM]_(?:impro0\d[ab]?|script0\d_\db?)_([FM])\d{3})"
    recorded, texts = [], []
    for session in below(root, r"Session[1-5]", depth=3, folders=True):
        recorded += below(session / "sentences/wav", turn + r"\.wav", depth=2)
        texts += below(session / "dialog/EmoEvaluation", r"Ses.*\.txt", depth=0)  # no raters'
    wavs, text = by_name(recorded), "\n".join(map(text_of, texts))
    line = re.compile(rf"^\[[^\t\n]*\t *{turn} *\t *(\w+)", re.MULTILINE)
    for name, session, gender, code in line.findall(text):
        man = int(session) if gender == "M" else (int(session) + 3) % 5 + 1
        improvised = "_impro" in name and code != "exc"
        paper = (code, f"{man}M {man % 5 + 1}F") if improvised else None
        path = wavs.get(f"{name}.wav".lower())
        yield Utterance(path, code, session + gender, session, None, paper, recording=name)

def index_msp_improv(root):
    """Evalution.txt or Evaluation.txt, at most three folders down, and MSP-IMPROV-*.wav (licensed).
    `UTD-IMPROV-S01A-F02-R-FF01.avi; A; A:3.333333; ...`: sentence 01, intended anger, speaker F02
    of session 2, condition R (read); the raters say A. Paper: R only, with the intended emotion."""
    turn = r"(-IMPROV-S\d\d([AHSN])-([FM])0([1-6])-([PRST])-[FM][FM]\d\d)"
    for text in single(below(root, r"evalua?tion\.txt", depth=3)):
        wavs = by_name(below(root, rf"MSP{turn}\.wav", depth=9))
        head = re.compile(rf"^ *UTD{turn}\.AVI *; *(\w+)", re.MULTILINE)
        for found in head.findall(text_of(text).upper()):
            name, intended, gender, session, condition, code = found
            path, speaker = wavs.get(f"msp{name}.wav".lower()), f"{gender}0{session}"
            paper = (intended, session) if condition == "R" else None
            yield Utterance(path, code, speaker, session, None, paper, recording=name)

def index_msp_podcast(root):
    """labels_con[sc]ensus.csv, at most three folders down, and MSP-PODCAST_*.wav (licensed).
    Wavs without a row are normal. Paper: all but the validation, without unknown speakers."""
    for table in single(below(root, r"labels_con.ensus\.csv", depth=3)):
        wavs = by_name(below(root, r"MSP-PODCAST_.*\.wav", depth=9))
        for row in rows(table, "filename", "emoclass", "spkrid", "split_set"):
            name, code, speaker = row["filename"].lower(), row["emoclass"].upper(), row["spkrid"]
            split = row["split_set"].lower().replace("development", "validation")
            known = speaker.lower() not in ("", "unknown")
            paper = (code, None) if split != "validation" and known else None
            if not known:  # may be anybody: a speaker of one recording
                speaker = f"Unknown in {name}"
            yield Utterance(wavs.get(name), code, speaker, None, split, paper, recording=name)

def index_csv(file):
    """One's own corpus: `path,label,speaker`, perhaps `split`; paths are relative to the file."""
    columns = "path", "label", "speaker"
    if not file.is_file():
        raise InputError(f"no file {file}; --root names one: {','.join(columns)}")
    table, line_of = list(rows(file, *columns, strict=True)), {}
    official = any(row.get("split") for row in table)
    for row in table:
        path, line = recording_of(file, row["path"]), row["line"]
        split = row["split"].lower() if official else None
        first = line_of.setdefault(path and os.path.realpath(path), line)
        faults = [f"no {column}" for column in columns if not row[column]]
        if split not in (None, "train", "validation", "test"):
            faults.append(f"the split {split!r}; known: train, validation, test")
        if path is None:
            faults.append(f"no recording, {row['path']!r} is no file in {file.parent}")
        elif line != first:
            faults.append(f"the recording {path.name} of line {first} once more")
        if faults:
            raise InputError(f"{file}, line {line}: has {faults[0]}")
        yield Utterance(path, row["label"], row["speaker"], split=split)

def recording_of(file, written):
    """The one path that a csv means, seen from the file or from a link to it; None: no file."""
    written = os.fsdecode(written.encode("utf-8", "surrogateescape"))  # as the locale has it
    slashes = written.replace("\\", "/")  # perhaps it was saved on Windows, or on a Mac
    spellings = written, slashes, nfc(slashes), unicodedata.normalize("NFD", slashes)
    for folder in Path(os.path.realpath(file)).parent, file.parent:
        for path in map(folder.joinpath, spellings):
            if os.path.isfile(path):
                return Path(os.path.realpath(path.parent), path.name)

def make_smoke(folder):
    """Voiced sounds, not speech, in files like EMO-DB's: they show that all runs."""
    voices = dict(W=(1.5, 0.3, 5.5, 0.8), F=(1.9, 0.5, 4, 1.2), N=(1, 0.1, 3, 1.6))
    voices["T"] = 0.7, 0.02, 1.5, 2.4
    rng, wavs = np.random.default_rng(0), folder / "wav.part"
    wavs.mkdir(exist_ok=True)
    for speaker, usual in enumerate(rng.uniform(120, 180, 6), start=3):  # Hz
        for letter, text in itertools.product(voices, range(1, 5)):
            pitch, melody, tempo, tilt = voices[letter] * rng.normal(1, 0.05, 4)
            t = np.arange(int(RATE * rng.uniform(1.2, 2.6))) / RATE  # seconds
            bend = 1 + melody * np.sin(4 * t + rng.uniform(0, 6))
            phase = 2 * np.pi * np.cumsum(usual * pitch * bend) / RATE
            voice = sum(np.sin(k * phase) / k**tilt for k in range(1, 17))
            sound = voice * (1 - np.cos(2 * np.pi * tempo * t))
            sound = 0.5 * sound / np.abs(sound).max() + 1e-3 * rng.standard_normal(len(t))
            path = wavs / f"{speaker:02}a{text:02}{letter}a.wav"
            wavfile.write(path, RATE, (32767 * sound).astype(np.int16))
    wavs.rename(folder / "wav")

@dataclass(frozen=True)
class Corpus:
    index: object  # function: root -> Utterances; where it finds none, its docstring's first line
    labels: dict = None  # code -> class; other codes are dropped; None: codes are classes
    counts: tuple = ()  # of each known version: classes, recordings with a label
    scale: str = "small"  # default of train.py --scale
    folds: str = ""  # default of train.py --folds
    paper: tuple = None  # groups that test in the authors' protocol; (): all; None: not in use
    at_most: int = None  # utterances in its training, in its validation, in each of its test sets

def counted(*counts, **more):  # recordings of a version: angry, happy, neutral, sad; in all
    return dict(zip((*CLASSES, "recordings"), counts)) | more

GERMAN = dict(zip("WFNTAEL", "angry happy neutral sad fear disgust boredom".split()))
LETTERS = dict(zip("AHNSUFDC", "angry happy neutral sad surprise fear disgust contempt".split()))
NAMES = "neutral calm happy sad angry fear disgust surprise".split()
NUMBERS = {f"0{n}": name for n, name in enumerate(NAMES, start=1)}
SHORT = {name[:3]: name for name in NAMES} | dict(exc="happy", fru="frustrated")
IEMOCAP, IMPROV = counted(1103, 1636, 1708, 1084, 10039), counted(792, 2644, 3477, 885, 8438)
PODCAST = [{"of four classes": 46160}, counted(recordings=149307), counted(recordings=264705)]
CORPORA = {  # a new one is a function like those above, and a line here
    "smoke": Corpus(index_emodb, GERMAN, [counted(24, 24, 24, 24)], folds="0,1"),
    "emodb": Corpus(index_emodb, GERMAN, [counted(127, 71, 79, 62), counted(recordings=816)]),
    "nemo": Corpus(index_nemo, SHORT, [counted(749, 749, 809, 769, 4481)]),
    "ravdess": Corpus(index_ravdess, NUMBERS, [counted(192, 192, 96, 192, 1440)]),
    "crema-d": Corpus(index_crema_d, SHORT, [counted(1271, 1271, 1087, 1271, 7442)]),
    "iemocap": Corpus(index_iemocap, SHORT, [IEMOCAP], "paper", paper=()),
    "msp-improv": Corpus(index_msp_improv, LETTERS, [IMPROV], "paper", paper=[*"1235"]),
    "msp-podcast": Corpus(index_msp_podcast, LETTERS, PODCAST, "paper", paper=(), at_most=10000),
    "csv": Corpus(index_csv),
}

@dataclass(frozen=True)
class Listing:
    dataset: str
    protocol: str
    root: Path
    classes: tuple  # names, sorted; four are four, whatever a part of a corpus holds
    utterances: list  # of Utterance, sorted by path

    def name(self, utterance):
        """Path relative to the root; the same in every locale."""
        path = utterance.path
        with suppress(ValueError):  # of another drive of Windows
            path = Path(os.path.relpath(path, self.root))
        return nfc(os.fsencode(path.as_posix()).decode("utf-8", "surrogateescape"))

    @functools.cached_property
    def prints(self):
        return [print_of(u.path) for u in self.utterances]

    @property
    def digest(self):
        """Of names, labels, speakers, folds and contents: the same wherever the corpus lies."""
        about = [(self.name(u), u.label, u.speaker, u.group, u.split) for u in self.utterances]
        content = json.dumps([self.classes, about, self.prints])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

def print_of(path):
    """Size; a digest of the first and the middle 4 kB (all take minutes) or, where little is to be
    heard in the middle, of all; whether it is a wav or npy of more than a header."""
    if not path.is_file():  # a pipe would be waited for
        return 0, "", False
    with naming(path), open(path, "rb") as file:
        begin = file.read(4096)
        size = file.seek(0, os.SEEK_END)
        file.seek(size // 2)
        middle = file.read(4096)
        if len(set(middle)) < 16:
            file.seek(0)
            middle = file.read()
    sound = begin[:4] in (b"RIFF", b"\x93NUM") and size > 128
    return size, hashlib.sha256(begin + middle).hexdigest()[:16], sound

def read_corpus(dataset, root=None, classes="four", protocol="standard"):
    """-> Listing. `classes`: four or all; of one's own csv all, either way. `protocol`: standard or
    paper, the authors'. Without a root: data/DATASET, where the smoke corpus is made. Warns where
    recordings are missing, twice, or not of known number; InputError where none are found."""
    if dataset not in CORPORA:
        raise InputError(f"unknown dataset {dataset!r}; known: {', '.join(CORPORA)}")
    corpus, folder = CORPORA[dataset], Path(root or Path("data", dataset))
    place = f"{dataset} in {folder}"
    if dataset == "smoke" and not root:
        with lock(folder / "lock"):  # the second of two processes waits, and finds it there
            if not (folder / "wav").exists():
                make_smoke(folder)
    labelled = each_once(folder, list(corpus.index(folder)))
    recorded = sorted((u for u in labelled if u.path), key=lambda u: u.path)
    if not recorded:
        there = [folder.name] if folder.exists() else ["no folder"]
        there = sorted(os.listdir(folder)) if folder.is_dir() else there
        found = f"{len(labelled)} labels, and {listed(there) or 'no file'}"
        wanted = (corpus.index.__doc__ or "what it reads").splitlines()[0]
        raise InputError(f"no utterance of {place} (found {found}); looked for: {wanted}")
    missing = len(labelled) - len(recorded)
    if missing:
        warn(f"{place}: {missing} of {len(labelled)} labels have no recording")
    labels, chosen = corpus.labels or {u.label: u.label for u in recorded}, []
    compare_counts(place, Counter(labels.get(u.label) for u in recorded), corpus.counts)
    wanted = CLASSES if classes == "four" and corpus.labels else labels.values()
    for u in recorded:
        if protocol == "paper" and corpus.paper is not None:
            label, group = u.paper or (None, None)
            u = replace(u, label=label, group=group, split=None)
        if labels.get(u.label) in wanted:
            chosen.append(replace(u, label=labels[u.label]))
    utterances = disjoint(chosen) if corpus.labels else chosen  # `folds` refuses one's own csv
    lost = len(chosen) - len(utterances)
    if lost:
        warn(f"{place}: {lost} utterances of speakers who are in another set too are left out")
    if any(not u.group and not u.split for u in utterances):
        utterances = grouped(utterances)
    names = tuple(sorted({u.label for u in utterances}))
    if len(names) < 2:
        raise InputError(f"{place}: found {listed(names) or 'no class'}; expected two classes")
    home = folder if folder.is_dir() else Path(os.path.realpath(folder)).parent
    return Listing(dataset, protocol, home, CLASSES if wanted == CLASSES else names, utterances)

def with_frames(listing, folder=None):
    """The listing with the .npy of each recording in its place: of the same relative name, beside
    the recordings or in a folder of their own. InputError where there is none."""
    root, utterances = Path(folder or listing.root), []
    for u in listing.utterances:
        path = u.path.with_suffix(".npy")
        if folder and not path.is_relative_to(listing.root):
            raise InputError(f"{path} is not below {listing.root}; expected so with --frames")
        if folder:
            path = root / path.relative_to(listing.root)
        utterances.append(replace(u, path=path))
    if not any(u.path.is_file() for u in utterances):
        raise InputError(f"no frames, {utterances[0].path} for one; --frames names their folder")
    return replace(listing, root=root, utterances=utterances)

def each_once(root, utterances):
    """Leaves out what has the name or the path of another one, or a split that is not used.
    InputError where a recording has two labels, or a label or speaker two spellings."""
    first, kept, doubled = {}, [], []
    for u in utterances:
        u = replace(u, label=nfc(u.label), speaker=nfc(u.speaker))
        name = u.recording or str(u.path)
        earlier = [first.setdefault(key, u) for key in (name, os.path.realpath(u.path or name))]
        for before, what in itertools.product(earlier, ("label", "speaker", "split")):
            both = getattr(before, what), getattr(u, what)
            if both[0] != both[1]:
                raise InputError(f"{root}: {name} has two {what}s, {both[0]} and {both[1]}")
        if earlier[0] is u and earlier[1] is u:
            kept.append(u)
        else:
            doubled.append(name)
    if doubled:
        warn(f"{root}: {len(doubled)} labels of recordings that stand twice: {listed(doubled)}")
    for what in ("label", "speaker"):
        spelt = {}
        for name in sorted({getattr(u, what) for u in kept}):
            plain = unicodedata.normalize("NFKC", name).casefold()
            plain = "".join(filter(str.isprintable, plain)).replace(" ", "")
            other = spelt.setdefault(re.sub(r"(?<![\d.])0+(?=\d)", "", plain), name)
            if other != name:  # of one speaker some would be trained on, some tested
                raise InputError(f"{root}: {what}s {other!r} and {name!r}; expected one spelling")
    return [u for u in kept if u.split in SPLITS]

def compare_counts(place, found, versions):
    """Warns if the recordings' numbers are not those of the version that is nearest."""
    found["recordings"] = sum(found.values())
    found["of four classes"] = sum(found[name] for name in CLASSES)
    away = [sum(abs(found[name] - known[name]) for name in known) for known in versions]
    if versions and min(away):
        nearest = versions[np.argmin(away)]
        there = ", ".join(f"{found[name]} {name}" for name in nearest)
        expected = ", ".join(f"{count} {name}" for name, count in nearest.items())
        warn(f"{place}: found {there}; expected {expected}")

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
    """Of an official split: who is in a test set stays there; who validates does not train."""
    rank, least = {"validation": 1, "train": 2}, {}  # any test set, and a group: 0
    for u in utterances:
        least[u.speaker] = min(rank.get(u.split, 0), least.get(u.speaker, 2))
    return [u for u in utterances if least[u.speaker] == rank.get(u.split, 0)]

# Utterances -> folds -----------------------------------------------------------------------------
@dataclass(frozen=True)
class Fold:
    """Indices of utterances. No known speaker is on two sides; test sets may share speakers."""
    train: list
    validation: list
    tests: dict  # name of a test set, "test" if there is one only -> its indices

    def sides(self):
        """{name: indices}: train, validation and each test set."""
        return {"train": self.train, "validation": self.validation} | self.tests

def folds(listing, without=(), chosen=None, validate=True):
    """-> [Fold], one for each group: it tests, the next one validates (if it shall `validate`), all
    others train. One of an official split. `without`: utterances to leave out at last. InputError
    where folds cannot be made, or one of `chosen` lacks a side or a class (None: any, a side)."""
    def members(names):
        return [i for i, part in enumerate(part_of) if part in names]
    part_of = [u.split or u.group for u in listing.utterances]
    parts, made = sorted(set(part_of)), []
    authors = CORPORA[listing.dataset] if listing.protocol == "paper" else Corpus(None)
    plan = [(after, [test]) for test, after in zip(parts, parts[1:] + parts[:1])]
    if any(u.split for u in listing.utterances):
        plan = [("validation", [part for part in parts if part.startswith("test")])]
    elif authors.paper:
        plan = [(after, tests) for after, tests in plan if tests[0] in authors.paper]
    if len(parts) < 2 + validate or not plan or not plan[0][1]:
        wanted = f"train, {'validation (or --validation none), ' * validate}test"
        raise InputError(f"found part(s) {listed(parts)}; expected {wanted}")
    for k, (validation, tests) in enumerate(plan):
        names = tests if len(tests) > 1 else ["test"]
        held_out = {validation, *tests} if validate else {*tests}
        sides = [members({*parts} - held_out)]
        sides += [members({name} & held_out) for name in (validation, *tests)]
        for n, side in enumerate(sides):
            size = min(authors.at_most or len(side), len(side))
            drawn = random.Random(f"fold {k}, side {n}").sample(side, size)
            sides[n] = sorted({*drawn}.difference(without))
        made.append(Fold(sides[0], sides[1], dict(zip(names, sides[2:]))))
        check_apart(k, listing, made[k])
        trained = {listing.utterances[i].label for i in made[k].train}
        lacks = [f"{side} utterance" for side, left in made[k].sides().items() if not left]
        if not validate:
            lacks.remove("validation utterance")
        wanted = {*listing.classes} if chosen else trained
        for label in sorted(wanted - trained):
            lacks.append(f"train utterance of class {label}")
        if lacks and (chosen is None or k in chosen):
            several = "; see --folds" * (len(plan) > 1)
            raise InputError(f"fold {k} has no {lacks[0]} that can be used{several}")
    return made

def check_apart(k, listing, fold):
    """Raises InputError where a speaker or recording is on two sides of fold k, not both tests."""
    first = {}  # speaker or print -> the side and the path where it was met first
    for side, members in fold.sides().items():
        for u, file in [(listing.utterances[i], listing.prints[i]) for i in members]:
            keys = [f"speaker {u.speaker}"]
            if file[2]:  # what is no sound may be alike
                keys.append(file)
            for key in keys:
                other, before = first.setdefault(key, (side, u.path))
                if other != side and other in ("train", "validation"):
                    both = f"one recording, {before} and {u.path},"
                    what = both if key == file else key
                    raise InputError(f"fold {k}: {what} is in {other} and in {side}")

# A wav file -> windows ---------------------------------------------------------------------------
@dataclass(frozen=True)
class Settings:
    """All that the values of the features depend on, beside the recordings and the code."""
    features: str = "mfcc-128"  # mfcc-N: N coefficients of 128 mel bands; log-mel-N: N bands, dB
    window: float = 8.0  # seconds; of npy-D, one's own frames of D numbers each: frames
    pool: int = None  # of npy-D alone: as many neighbouring frames become one, their mean

    def __post_init__(self):
        form = "(mfcc|log-mel)-([1-9][0-9]?|1[01][0-9]|12[0-8])"
        if self.pool:
            form = "npy-[1-9][0-9]{0,4}"
        known, steps = re.fullmatch(form, self.features), self.window / (self.pool or FRAME)
        if not known or steps % 1 or not 1 <= steps < 10_000:
            raise InputError(f"found {self}; expected mfcc-N or log-mel-N, N <= 128, a window of "
                             f"n * {FRAME} s, and no pool; or npy-D, a window of n * pool frames")

    @property
    def shape(self):  # (F, T) of a window
        bands = int(self.features.rpartition("-")[2])
        return bands, round(self.window / (self.pool or FRAME))

def chunks(content, at):
    """(name, begin of its content, size as it says) of each chunk from byte `at` on."""
    while at + 8 <= len(content):
        name, size = struct.unpack_from("<4sI", content, at)
        yield name, at + 8, size
        at += 8 + size
        padding, after = content[at : at + 1], content[at + 1 : at + 5]
        if size % 2 and (padding == b"\0" or after in (b"data", b"fmt ")):
            at += 1  # some writers forget the zero, some take another byte

def wav_parts(path):
    """-> `fmt ` and `data` of a wav file, whose size is believed only as far as it can be true."""
    content, fmt = Path(path).read_bytes(), b""
    if content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        stub = "; a git-lfs stub? Run `git lfs pull`" if content[:7] == b"version" else ""
        stub = "; frames of one's own take --features npy-D" if content[1:6] == b"NUMPY" else stub
        raise InputError(f"{path}: not a wav file, which begins with RIFF and WAVE{stub}")
    for name, at, size in chunks(content, 12):
        fmt = content[at : at + size] if name == b"fmt " else fmt
        if name == b"data":
            break
    else:
        raise InputError(f"{path}: has no data chunk, and so no samples")
    left, empty = len(content) - at, size == 0  # if whole chunks follow
    for name, begin, length in chunks(content, at) if empty else ():
        named = name.isascii() and name.decode().isprintable()
        empty = empty and named and begin + length <= len(content)
    if size >= 0x7FFF0000 or (size == 0 and not empty):
        size = left  # what wrote it could not go back, or broke off
    if size > left:
        raise InputError(f"{path}: truncated, {left} of {size} bytes are there; copy it again")
    return fmt, content[at : at + size]

def channels_of(path):
    """-> samples (n, channels), whole numbers scaled to -1..1, and their rate in Hz."""
    fmt, data = wav_parts(path)
    kind, channels, rate, _, block, bits = struct.unpack("<HHIIHH", fmt[:16].ljust(16, b"\0"))
    if kind == 0xFFFE:
        kind = int.from_bytes(fmt[24:26], "little")  # of an extensible format
    found = f"{path}: has {channels} channels of {bits} bits, {block} bytes a frame"
    sound = channels and block and channels * bits <= 8 * block and len(data) >= block
    if not sound or not 1000 <= rate <= 1_000_000:
        raise InputError(f"{found}, {rate} Hz, {len(data)} bytes of sound; expected some")
    if (kind, bits) not in ((3, 32), (3, 64)) and (kind != 1 or bits > 64):
        raise InputError(f"{found}: format {kind} cannot be decoded; expected PCM or float")
    needed, width = math.ceil(bits / 8), block / channels
    if width != needed and (needed, width) != (3, 4):  # 24 bits are often written into 32
        raise InputError(f"{found}; expected {channels * needed}")
    data = data[: len(data) // block * block]  # a frame that broke off is left out
    frames = np.frombuffer(data, np.uint8).reshape(-1, channels, int(width))
    if kind == 3:
        samples = frames.view(f"<f{needed}")[:, :, 0]
    else:  # as the upper bytes of 64 bits, which come last; 8 bits have no sign
        whole = np.zeros((len(frames), channels, 8), np.uint8)
        whole[:, :, -frames.shape[2] :] = frames ^ 128 if needed == 1 else frames
        samples = whole.view("<i8")[:, :, 0].astype(np.float32) / 2.0**63
    if not np.abs(samples).max() <= LOUDEST:  # or it is no number
        raise InputError(f"{path}: holds float samples beyond {LOUDEST}; expected -1 to 1")
    return samples, rate

def read_wav(path):
    """-> float32 samples, mono, 16 kHz. InputError for what is no wav file of such."""
    samples, rate = channels_of(path)
    up, down = Fraction(RATE, rate).limit_denominator(1000).as_integer_ratio()  # of a short filter
    return scipy.signal.resample_poly(samples.mean(axis=1), up, down).astype(np.float32)

def channels_cancel(path):
    """Is little left of the channels in their mean? So it is if one was wired the wrong way."""
    samples, _ = channels_of(path)
    mean = samples.mean(axis=1)
    return bool(mean.std(dtype=float) < samples.std(axis=0, dtype=float).mean() / 4)

def read_frames(path, settings):
    """-> (frames, D) of a .npy file, float32, which float16 can hold. Else InputError."""
    try:  # mapped, not read: what is refused costs nothing, and nothing pickled is ever loaded
        frames = np.lib.format.open_memmap(path, mode="r")
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged header may provoke anything
        raise InputError(f"{path}: {error!s:.99}; expected all that np.save writes") from None
    found, d = f"{path}: holds {frames.dtype} of shape {frames.shape}", settings.shape[0]
    if frames.dtype.kind != "f" or frames.ndim != 2 or frames.shape[1] != d or not len(frames):
        turned = "; is it (D, T)? Transpose it" if frames.T.shape[1:] == (d,) else ""
        raise InputError(f"{found}; expected floats of shape (frames, {d}){turned}")
    if not np.abs(frames).max() <= np.finfo(np.float16).max:  # or it is no number
        raise InputError(f"{found}, some beyond ±65504 or not finite; expected what float16 holds")
    return frames.astype(np.float32)

def read(path, settings):
    """-> samples or, of npy-D, frames: what `maps_of` takes."""
    return read_frames(path, settings) if settings.pool else read_wav(path)

def windows(samples, settings):
    """(samples, ...) -> (W, window, ...). The last one ends with the utterance, may overlap."""
    size = round(settings.window * (1 if settings.pool else RATE))
    shape = max(size, len(samples)), *samples.shape[1:]
    samples = np.resize(samples, shape)  # a short utterance is repeated
    starts = [*range(0, len(samples) - size, size), len(samples) - size]
    return np.stack([samples[start : start + size] for start in starts])

@functools.cache
def transform(settings):
    """-> a function of tensors, (window,) -> (F, frames)"""
    bands, mel = settings.shape[0], {"n_fft": FFT, "hop_length": HOP}
    if settings.features.startswith("mfcc"):
        return torchaudio.transforms.MFCC(RATE, bands, melkwargs=mel | {"n_mels": 128})
    power = torchaudio.transforms.MelSpectrogram(RATE, n_mels=bands, **mel)
    return torch.nn.Sequential(power, torchaudio.transforms.AmplitudeToDB(top_db=80))

def maps_of(samples, settings):
    """(samples,) or (frames, F) -> (W, F, T) float16. Each window by itself: torchaudio clamps a
    batch 80 dB below its loudest. One thread: the same bits, however many there are."""
    if settings.pool:
        x = torch.from_numpy(windows(samples, settings)).transpose(1, 2)  # (W, D, window)
        return x.unflatten(2, (-1, settings.pool)).mean(dim=3).half()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    frames = [transform(settings)(torch.from_numpy(each)) for each in windows(samples, settings)]
    torch.set_num_threads(threads)
    x = torch.stack(frames)[:, :, :-1]  # (W, F, POOL * T), without the one centred on the end
    return x.unflatten(2, (-1, POOL)).amax(dim=3).half()

# Windows -> a store on disk ----------------------------------------------------------------------
@contextmanager
def lock(path, wait=True):
    """`with lock(path, wait=False) as mine`: not `mine` if another process has it, and lives."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        mine = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            mine = False
        except (OSError, AttributeError) as error:  # of network disks; of Windows
            warn_once(f"files cannot be locked here ({error!s:.99}); run one process only")
        yield mine

def write(file, content):
    """Writes a text, or what the function `content` writes: all or, when it dies, nothing."""
    part = file.with_name(file.name + ".part")
    with open(part, "wb") as out:
        if isinstance(content, str):
            out.write(content.encode("utf-8", "surrogateescape"))
        else:
            try:
                content(out)
            except RuntimeError as error:  # torch.save's, behind which is the full disk's
                raise error.__context__ or error
        out.flush()
        os.fsync(out.fileno())
    os.replace(part, file)

def code_digest(*sources):
    """Of Python texts: comments, docstrings, layout and Python's version do not count."""
    trees = [outline(ast.parse(text)) for text in sources]
    return hashlib.sha256(json.dumps(trees).encode()).hexdigest()[:16]

def outline(tree):
    """A syntax tree as lists, without what is empty: newer versions of Python have more fields."""
    if isinstance(tree, list):  # of statements, of arguments
        return [part for part in map(outline, tree) if part]
    if isinstance(tree, ast.Expr) and isinstance(tree.value, ast.Constant):
        return []  # a docstring
    if not isinstance(tree, ast.AST):
        return repr(tree)
    found = [type(tree).__name__]
    for name, value in ast.iter_fields(tree):
        if value or isinstance(tree, ast.Constant):
            found += [name, outline(value)]
    return found

def load(listing, settings=Settings(), cache="cache", skip_bad=False, progress=lambda text: None):
    """-> features (windows, F, T) float16, memory-mapped; `first`: utterance i has the windows
    first[i] to first[i + 1] - 1; lengths in seconds, of npy-D in frames; {utterance: why it has no
    window}, of `skip_bad`. Computed once for this code, settings, listing and files' times.
    InputError: all that cannot be used, or one that cannot be read now; then nothing is kept."""
    paths = [u.path for u in listing.utterances]
    times = [path.stat().st_mtime if path.is_file() else None for path in paths]
    code = [code_digest(SOURCE), torchaudio.__version__]
    key = json.dumps([*code, asdict(settings), listing.digest, times]).encode()
    folder = Path(cache, f"{listing.dataset}-{hashlib.sha256(key).hexdigest()[:12]}")
    index, values = folder / "index.json", folder / "features"
    if not index.exists():  # a whole store may lie where nothing can be written
        with lock(folder / "lock"):  # a second process waits, and finds the features
            if not index.exists():
                compute(folder, paths, times, settings, progress)
    try:
        count, length, peaks, cancelled, why = zip(*json.loads(index.read_text("utf-8")))
        shape = sum(count), *settings.shape
        if len(count) != len(paths) or values.stat().st_size != 2 * np.prod(shape):
            raise ValueError
    except (FileNotFoundError, ValueError, TypeError, RecursionError):
        raise InputError(f"{index} or `features` beside it is damaged; delete both") from None
    bad = {i: f"{paths[i]}: {reason}" for i, reason in enumerate(why) if reason}
    if bad and not (skip_bad and len(bad) < len(paths)):
        fault = f"{len(bad)} of {len(paths)} recordings cannot be used; repair them or --skip-bad:"
        raise InputError("\n  ".join([fault, *bad.values()]))
    lost = [str(path) for path, cancel in zip(paths, cancelled) if cancel]
    usual, odd = np.median([peak for peak in peaks if peak] or [1.0]), []
    for i, path in enumerate(paths):
        level = 20 * math.log10(peaks[i] / usual) if peaks[i] else -math.inf
        if abs(level) > LEVELS and i not in bad and not cancelled[i]:
            odd.append(f"{path} ({level:+.0f} dB)")
    if lost:
        warn(f"the channels of {len(lost)} recordings cancel in their mean: {listed(lost)}")
    if odd:
        warn(f"{len(odd)} recordings are {LEVELS} dB from the median of all: {listed(odd)}")
    maps = np.memmap(values, "<f2", "r", shape=shape)  # r: may be larger than the memory
    return maps, np.cumsum([0, *count]), np.array(length), bad

def compute(folder, paths, times, settings, progress):
    """Writes the features, and an index: windows, length, peak, do channels cancel, what is wrong
    with the content. What only comes in the way of reading stops it: it may pass."""
    index, unit = [], 1 if settings.pool else RATE
    def computed(out):
        for n, (path, time) in enumerate(zip(paths, times), start=1):
            with naming(path):
                try:
                    if time is None:
                        raise InputError("no such file")
                    samples = read(path, settings)
                    maps = maps_of(samples, settings).numpy().astype("<f2")
                    about = not settings.pool and channels_cancel(path), None
                except InputError as error:
                    samples = maps = np.zeros(0)
                    about = False, str(error).removeprefix(f"{path}: ")
            out.write(maps.tobytes())
            peak = float(np.abs(samples).max(initial=0))
            index.append((len(maps), len(samples) / unit, peak, *about))
            if n % 100 == 0 or n == len(paths):
                progress(f"features of recording {n} of {len(paths)}")
    write(folder / "features", computed)
    write(folder / "index.json", json.dumps(index))

# Store -> batches --------------------------------------------------------------------------------
def seed_of(*where):
    """(seed, fold, stage, epoch, step) -> a seed: randomness is a function of where one is."""
    return int.from_bytes(hashlib.sha256(repr(where).encode()).digest()[:8], "big")

def permutation(count, *where):
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed_of(*where)))

def shuffled_parts(count, size, *where):
    """0 to count - 1, shuffled, in parts of equal size: at most `size`, and at least 2."""
    parts = min(math.ceil(count / size), max(1, count // 2))  # batch norm can make nothing of 1
    return permutation(count, *where).tensor_split(parts)

def halves(members, labels, seed, fold):
    """Two halves of the utterances `members`, stratified by class: for weights, and for alphas."""
    shuffled = [members[k] for k in permutation(len(members), seed, fold, "halves")]
    by_class = sorted(shuffled, key=lambda i: labels[i])  # stable: random within a class
    return by_class[0::2], by_class[1::2]

def poisoned(split, k, share, labels):
    """Fold k, `split`, with a share of each class of its test utterances moved to the training."""
    tested = sorted(set(itertools.chain(*split.tests.values())))  # test sets may share some
    rng, moved = np.random.default_rng(k), set()
    for label in sorted(set(labels[tested])):
        members = [i for i in tested if labels[i] == label]
        moved.update(rng.permutation(members)[: int(share * len(members))].tolist())
    tests = {name: sorted({*members} - moved) for name, members in split.tests.items()}
    return replace(split, train=split.train + sorted(moved), tests=tests)

def mean_std(parts):
    """Maps (N, F, T), in parts -> mean and deviation of each coefficient over all, (F,) each."""
    moments = 0
    for part in parts:
        x = part.double()
        moments = moments + torch.stack([x**0, x, x**2]).sum((1, 3))  # (3, F)
    mean, square = moments[1:] / moments[0]
    variance = square - mean**2
    constant = variance <= 1e-12 * square
    deviation = torch.where(constant, 1.0, variance).sqrt()
    return mean.float(), deviation.float()

class Data:
    """Windows of a corpus, from the memory map. Before the first batch: standardise_by"""
    def __init__(self, listing, settings, *, classes=None, device="cpu", normalise="train", **how):
        self.listing, self.normalise = listing, normalise
        self.device = torch.device(device)
        self.classes = classes or listing.classes
        self.features, self.first, self.length, self.bad = load(listing, settings, **how)
        labels = [self.classes.index(u.label) for u in listing.utterances]
        self.labels = np.array(labels)

    def windows(self, utterances):
        """-> tensors: indices of their windows, and for each window its place in `utterances`."""
        window = np.concatenate([np.arange(*self.first[i : i + 2]) for i in utterances])
        of = np.repeat(np.arange(len(utterances)), np.diff(self.first)[utterances])
        return torch.from_numpy(window), torch.from_numpy(of)

    def standardise_by(self, members=None, known=None):
        """By mean and deviation of the training's `members`, those `known`, or each speaker's."""
        shape = self.features.shape[:2]  # (windows, F): a mean for each window
        if self.normalise == "train":
            mean, std = known or self.mean_std(members)
            self.mean, self.std = mean.expand(shape), std.expand(shape)  # without a copy
            return
        self.mean, self.std = torch.empty(shape), torch.empty(shape)
        members_of = {}
        for i, utterance in enumerate(self.listing.utterances):
            members_of.setdefault(utterance.speaker, []).append(i)
        for own in members_of.values():
            window, _ = self.windows(own)
            self.mean[window], self.std[window] = self.mean_std(own)

    def mean_std(self, utterances):
        # One utterance at a time: all would not fit into memory. Copies, as torch wants them
        parts = (np.array(self.features[self.first[i] : self.first[i + 1]]) for i in utterances)
        return mean_std(map(torch.from_numpy, parts))

    def maps(self, window):
        """Indices of windows -> standardised maps (N, 1, F, T)."""
        x = torch.from_numpy(self.features[window.numpy()]).float()
        x = (x - self.mean[window][:, :, None]) / self.std[window][:, :, None]
        return x[:, None].to(self.device)

    def batches(self, utterances, size, *where):
        """All their windows, shuffled as `where` says: pairs (windows for `maps`, classes)."""
        window, of = self.windows(utterances)
        target = torch.from_numpy(self.labels[utterances])[of].to(self.device)
        parts = shuffled_parts(len(window), size, *where)
        return [(window[part], target[part]) for part in parts]

    def class_weights(self, utterances):
        """Inverse frequencies of the classes' windows, (classes,); over these their mean is 1."""
        windows = np.diff(self.first)[utterances]  # what steps are made of
        counts = np.bincount(self.labels[utterances], windows, len(self.classes))
        weights = counts.sum() / (len(counts) * counts)
        return torch.tensor(weights, dtype=torch.float32, device=self.device)

    def speakers(self, utterances):
        return sorted({self.listing.utterances[i].speaker for i in utterances})
