"""x"""
import contextlib
import copy
import csv
import errno
import inspect
import io
import itertools
import json
import math
import multiprocessing.forkserver
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import scipy.fft
import scipy.stats
import torch
import torch.nn.functional as F
import torchaudio
from torch import nn

import emodarts
import features
import train
from emodarts import CNN_OPS, SEQ_OPS, SEQ_SPACES, Architect, Genotype, MixedOp, Network, decided, derive
from emodarts import expected_parameters, without_statistics
from features import CORPORA, InputError, Listing, Settings, Utterance, folds, load, lock, read_corpus

HERE = Path(__file__).parent
close = torch.testing.assert_close


def read_json(file):
    return json.loads(Path(file).read_text())



SHORT = Settings(8, 1.0)


def tree(root, files):
    """Writes {path below the root: text, bytes or None for an empty file}. -> root"""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content or b"")
    return root


def empty(names, below=""):
    return {f"{below}{name}": None for name in names}


def riff(x, kind=1, bits=16, channels=1, rate=16000, extensible=False, extra=False):
    """A wav file of samples, or of bytes as they are."""
    if kind == 3 and not isinstance(x, bytes):
        x = x.astype(f"<f{bits // 8}").tobytes()
    elif not isinstance(x, bytes):  # whole numbers, of which the lower bytes come first; 8 bits have no sign
        whole = np.round(x * 2.0 ** (bits - 1) + (128 if bits == 8 else 0)).astype("<i8")
        x = whole.view(np.uint8).reshape(-1, 8)[:, : bits // 8].tobytes()
    block = channels * bits // 8
    form = struct.pack("<HHIIHH", 0xFFFE if extensible else kind, channels, rate, rate * block, block, bits)
    if extensible:
        form += struct.pack("<HHIH", 22, bits, 0, kind) + b"\x00\x00\x00\x00\x10\x00\x80\x00\x00\xaa\x00\x38\x9b\x71"
    chunks = [(b"fmt ", form), (b"data", x)]
    if extra:
        chunks = [(b"JUNK", b"\0" * 28), chunks[0], (b"LIST", b"INFOabc\0"), chunks[1], (b"LIST", b"INFO")]
    body = b"".join(name + struct.pack("<I", len(part)) + part + b"\0" * (len(part) % 2) for name, part in chunks)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body


def tone(seconds=0.3, frequency=440):
    return riff(0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * 16000)) / 16000))


def speakers(listing, fold):
    """Of training, validation and each test set."""
    return [{listing.utterances[i].speaker for i in members} for _, members in fold.sides()]


def check(root, dataset, wanted, groups, tested=None, **choice):
    """-> Listing of {name: label}, where that is a class; in its folds the groups test and the next one validates."""
    listing = read_corpus(dataset, root, **choice)
    known = {*wanted.values()} if choice.get("classes") == "all" or dataset == "csv" else features.CLASSES
    assert {u.path.name: u.label for u in listing.utterances} == {n: c for n, c in wanted.items() if c and c in known}
    turns = [(groups[k], groups[(k + 1) % len(groups)]) for k in tested or range(len(groups))]
    sides = [[set().union(*groups) - test - validation, validation, test] for test, validation in turns]
    assert [speakers(listing, fold) for fold in folds(listing)] == sides
    return listing


WORDS = [b",", b";", b"\t", b"\n", b"\r", b'"', b"\0", b"A" * 5000, b'"' + b"x" * 140_000, b"/", b"..", b"Train", b"[",
         b"\xd9\xa3", b"\xc5\xbf", b"Unknown"]


def mutants(content, many, tokens=(b"",)):
    """Copies of a file: bytes changed, cut, repeated, numbers at their limits, tokens that its format knows."""
    random = np.random.default_rng(0)
    for _ in range(many):
        mutant = bytearray(content)
        for _ in range(random.integers(1, 5)):
            at, n = int(random.integers(len(mutant) + 1)), int(random.integers(1, 9))
            new = [bytes(random.integers(0, 256, n, dtype=np.uint8)), bytes(mutant[:at][-50:]), b"\xff" * n, b"\0" * n]
            new += [b"", b"\x7f\xff\xff\xff"] + [tokens[random.integers(len(tokens))]] * 3
            mutant[at : at + n * int(random.integers(2))] = new[random.integers(len(new))]
        yield bytes(mutant[: at if random.integers(8) == 0 else None])


def feed(path, many, use, tokens=WORDS, answers="used refused"):
    """A file and its mutants are used or refused within 5 s each, with all of these answers."""
    content, found = path.read_bytes(), set()
    for mutant in (content, *mutants(content, many, tokens)):
        path.write_bytes(mutant)
        started = time.perf_counter()
        try:
            use()
            found.add("used")
        except InputError:
            found.add("refused")
        assert time.perf_counter() - started < 5, mutant
    assert found == set(answers.split())


def divide(*arguments, protocols=("standard", "paper")):
    return [folds(read_corpus(*arguments, "all", protocol)) for protocol in protocols]


@pytest.mark.parametrize("depth", ["", "a/", "a/b/"])
def test_free_corpora(tmp_path, depth):
    codes = dict(W="angry", F="happy", N="neutral", T="sad", A="fear", E="disgust", L="boredom")
    emodb = {f"{s}a01{e}a.WAV": codes[e] for s in ("03", "08", "10") for e in codes}
    names = "neutral calm happy sad angry fear disgust surprise".split()
    ravdess = {f"03-01-0{n}-01-02-01-{a:02}.wav": name for a in range(1, 25) for n, name in enumerate(names, start=1)}
    codes = dict(ANG="angry", DIS="disgust", FEA="fear", HAP="happy", NEU="neutral", SAD="sad")
    crema = {f"{a}_DFA_{code}_XX.wav": codes[code] for a in range(1001, 1092) for code in codes}
    ends = [(1001, 1018), (1019, 1036), (1037, 1054), (1055, 1072), (1073, 1091)]
    codes = dict(anger="angry", fear="fear", happiness="happy", neutral="neutral", sadness="sad", surprised="surprise")
    nemo = {f"{s}_{code}_{n}.wav": codes[code] for s in ("EB0", "IC0", "WR0") for code in codes for n in "12"}
    table = [f'{n}\t{n.split("_")[1]}\t"Tak\ttak\t        {n[:3]}\tmale\t23\r\n' for n in [*nemo, "WR0_fear_9.wav"]]
    table = "file_id\temotion\traw_text\tnormalized_text\tspeaker_id\tgender\tage\r\n" + "".join(table)
    for dataset, wanted, groups in (
        ("emodb", emodb, [{"03"}, {"08"}, {"10"}]),
        ("ravdess", ravdess, [{f"{k + a:02}" for a in range(4)} for k in range(1, 25, 4)]),
        ("crema-d", crema, [{str(a) for a in range(first, last + 1)} for first, last in ends]),
        ("nemo", nemo, [{"EB0"}, {"IC0"}, {"WR0"}]),
    ):
        others = [".DS_Store", "notes.wav", "03-02-05-01-01-01-01.wav", "x_anger_1.wav"]
        others += ["._" + min(wanted), ".git/" + min(wanted)]
        files = empty([*wanted, *others], f"{depth}samples/") | {f"{depth}data.tsv": table}
        root = tree(tmp_path / dataset, files | empty(wanted, f"{depth}samples/again/"))
        assert check(root, dataset, wanted, groups, classes="all").classes == tuple(sorted({*wanted.values()}))
        listing = check(root, dataset, wanted, groups)
        fold = folds(listing)[0]
        assert [fold.name] == [*fold.tests] and fold.name in next(features.describe_folds(listing, {0: fold}))


@pytest.mark.parametrize("depth", ["", "IEMOCAP", "IEMOCAP_full_release_withoutVideos/IEMOCAP_full_release"])
def test_iemocap(tmp_path, capsys, depth):
    files, wanted, paper = {}, {}, {}
    codes = dict(ang="angry", hap="happy", exc="happy", neu="neutral", sad="sad", fru="frustrated", xxx=None, oth=None)
    for s, dialog in product("12345", ("F_impro04", "M_script01_1b")):
        session, dialog, text = f"Session{s}", f"Ses0{s}{dialog}", ["% [START_TIME - END_TIME] TURN_NAME EMOTION"]
        for (n, code), who in product(enumerate(codes), "FM"):
            turn = f"{dialog}_{who}{n:03}"
            text += [f"[6.2901 - 8.2357]\t{turn}\t{code}\t[2.5000, 2.5000, 2.5000]", "C-E2:\tNeutral;\t()", "\xe9", ""]
            files |= empty([f"{turn}.wav", f"._{turn}.wav"], f"{session}/sentences/wav/{dialog}/")
            wanted[f"{turn}.wav"] = codes[code]
            paper[f"{turn}.wav"] = codes[code] if "impro" in dialog and code != "exc" else None
        files |= empty([f"wav/{dialog}.wav", f"EmoEvaluation/Categorical/{dialog}_e1.txt"], f"{session}/dialog/")
        files |= {f"{session}/dialog/transcriptions/{dialog}.txt": None}  # the label file's name
        files |= {f"{session}/dialog/EmoEvaluation/._{dialog}.txt": b"\x00\x05\x16\x07"}
        files |= {f"{session}/dialog/EmoEvaluation/{dialog}.txt": "\r\n".join(text).encode("latin-1")}
    root = tree(tmp_path / depth, files)
    sessions, pairs = [{f"{s}F", f"{s}M"} for s in range(1, 6)], [{f"{s}M", f"{s % 5 + 1}F"} for s in range(1, 6)]
    check(tmp_path, "iemocap", wanted, sessions, classes="all")
    standard = check(tmp_path, "iemocap", wanted, sessions)
    assert all(u.speaker == u.path.name[4] + u.path.stem[-4] for u in standard.utterances)  # the last letter
    check(tmp_path, "iemocap", paper, pairs, protocol="paper")
    (root / "Session3/sentences/wav/Ses03F_impro04/Ses03F_impro04_F000.wav").unlink()
    assert len(read_corpus("iemocap", tmp_path).utterances) == 99
    assert "1 of 160 labels have no recording" in capsys.readouterr().err
    with pytest.raises(InputError, match="1 of 160 labels"):
        read_corpus("iemocap", tmp_path, strict=True)
    labels = root / "Session1/dialog/EmoEvaluation/Ses01F_impro04.txt"
    feed(labels, 20, lambda: divide("iemocap", tmp_path), answers="used")


@pytest.mark.parametrize("name", ["Evalution.txt", "Evaluation.txt", "labels/evaluation.TXT", "Labels/Evalution.txt"])
def test_msp_improv(tmp_path, name):
    files, text, rated, read = {}, [], {}, {}
    codes = dict(A="angry", H="happy", N="neutral", S="sad", X=None, O=None)
    for s, who, letter, condition in product(range(1, 7), "FM", "AHNS", "RST"):
        stem = f"IMPROV-S01{letter}-{who}{s:02}-{condition}-FM01"
        files |= empty([f"MSP-{stem}.wav", f"MSP-{stem}.avi"], f"Audio/session{s}/S01{letter}/{condition}/")
        heard = {"T": "X", "S": "O", "R": "N"}[condition] if letter == "S" else letter
        text += [f"UTD-{stem}.avi; {heard}; A:3.333333; V:NaN; D:3.000000 ; N:3.666667;"]
        text += ["WORKER00000001; Angry; Angry,Frustrated; A:3.000000; V:2.000000; D:3.000000; N:4.000000;", ""]
        rated[f"MSP-{stem}.wav"] = codes[heard]
        read[f"MSP-{stem}.wav"] = codes[letter] if condition == "R" else None  # the intended emotion of what was read
    root = tree(tmp_path / "a/MSP-IMPROV", files | {name: "\r\n".join(text)})
    sessions = [{f"F{s:02}", f"M{s:02}"} for s in range(1, 7)]
    assert check(tmp_path, "msp-improv", rated, sessions).classes == features.CLASSES  # four, though nobody is sad
    check(tmp_path, "msp-improv", read, sessions, tested=(0, 1, 2, 4), protocol="paper")
    feed(root / name, 120, lambda: divide("msp-improv", tmp_path))


def msp_podcast(label_file="labels_consensus.csv", audio="Audios", validation="Development"):
    text = ["FileName,EmoClass,EmoAct,EmoVal,EmoDom,SpkrID,Gender,Split_Set"]
    files = empty(["MSP-PODCAST_test3_0001.wav", "._MSP-PODCAST_0000_6500.wav"], f"{audio}/")
    splits = ["Train"] * 3 + [validation] + ["Test1"] * 3 + ["Test2"] * 3
    for k, (split, speaker) in enumerate(zip(splits, (1, 2, "Unknown", 3, 4, 7, "Unknown", 4, 5, 6))):
        for code, n in product("AHNSUFDCOX", range(3)):
            name = f"MSP-PODCAST_{k:04}_{ord(code):02}{n:03}.wav"
            files[f"{audio}/part{k % 2}/{name}"] = None
            text.append(f"{name},{code},2.2,4.0,2.6,{speaker},Male,{split}")
    text.append("MSP-PODCAST_test3_0002.wav,N,2.2,4.0,2.6,9,Male,Test3")
    return files | {label_file: b"\xef\xbb\xbf" + "\r\n".join(text).encode()}


@pytest.mark.parametrize("name, audio, validation", [
    ("Labels/labels_consensus.csv", "Audios", "Development"), ("Labels/Labels_Concensus.csv", "Audio", "Validation"),
    ("labels_concensus.csv", "Audios", "Validation"), ("labels_consensus.csv", "Audio", "Development"),
])
def test_msp_podcast(tmp_path, capsys, name, audio, validation):
    table = tree(tmp_path / "a", msp_podcast(name, audio, validation)) / name
    standard = read_corpus("msp-podcast", tmp_path)
    assert Counter(u.label for u in standard.utterances) == dict.fromkeys(features.CLASSES, 30)
    assert len(read_corpus("msp-podcast", tmp_path, classes="all").classes) == 8
    (fold,) = folds(standard)  # one, as the two test sets are tested with one training
    assert [*fold.tests] == ["test1", "test2"] and fold.name == "test1, test2"
    assert speakers(standard, fold) == [{"1", "2", "Unknown"}, {"3"}, {"4", "7", "Unknown"}, {"4", "5", "6"}]
    said = "\n".join(features.describe(standard, [fold], features.Store(None, np.arange(121), np.ones(120), {})))
    assert "speakers  7: 1, 2, 3, 4, 5, 6, 7\n" in said and "unknown   24 utterances" in said
    assert "test1 4, 7, Unknown (36), test2 4, 5, 6 (36), validation 3 (12), training 36" in said

    # Of those who train, let speaker 1 be 4 now and then, who also tests, and 2 be 3, who validates.
    text = table.read_text().replace(",1,Male,Train", ",4,Male,Train", 5).replace(",2,Male,Train", ",3,Male,Train", 6)
    table.write_text(text)
    listing, left_out = read_corpus("msp-podcast", tmp_path), len(re.findall(r",[AHNS],.*,[34],Male,Train", text))
    assert left_out > 5 and f"warning: msp-podcast: {left_out} utterances" in capsys.readouterr().err
    assert speakers(listing, folds(listing)[0])[:2] == [{"1", "2", "Unknown"}, {"3"}]
    feed(table, 30, lambda: divide("msp-podcast", tmp_path))


def test_msp_podcast_paper(tmp_path, monkeypatch):
    """Pools what is not for validation; no side has more utterances than it may, drawn without any global state."""
    monkeypatch.setattr(features.random, "random", None)
    listing = read_corpus("msp-podcast", tree(tmp_path, msp_podcast()), protocol="paper")
    whole = folds(listing)
    assert [fold.name for fold in whole] == ["1", "2", "4", "5", "6", "7"]  # neither Unknown nor Development
    monkeypatch.setitem(CORPORA, "msp-podcast", replace(CORPORA["msp-podcast"], at_most=7))
    assert folds(listing) == folds(listing)
    for before, after in zip(whole, folds(listing)):
        for (_, everyone), (_, some) in zip(before.sides(), after.sides()):
            assert len(some) == 7 and set(some) < set(everyone) and some != everyone[:7]


def test_csv(tmp_path):
    wanted = {f"{s}{label}.wav": label for s in "abc" for label in ("zen", "awe")}
    rows = [f"sounds/{name},{label},{name[0]}" for name, label in wanted.items()]
    many = [f"{s}_{n}.wav,{'xy'[n % 2]},{s}" for s in range(12) for n in range(s + 1)]
    tree(tmp_path, empty(row.split(",")[0] for row in rows + many))
    file = tree(tmp_path, {"mine.csv": "\n".join(["path,label,speaker", *rows])}) / "mine.csv"
    few = check(file, "csv", wanted, [{"a"}, {"b"}, {"c"}])
    assert few.classes == ("awe", "zen") and few.root == tmp_path and few.name(few.utterances[0]) == "sounds/aawe.wav"
    feed(file, 200, lambda: divide("csv", file, protocols=["standard"]))
    file.write_text("\n".join(["path,label,speaker", *many]))
    sizes = [len(fold.tests[fold.name]) for fold in folds(read_corpus("csv", file))]
    assert len(sizes) == 5 and sum(sizes) == 78 and max(sizes) - min(sizes) <= 4


SPLIT = "".join(f"{s}{n}.wav,{n},{s},{split}\n" for s, split in zip("abc", ("train", "validation", "test")) for n in "xy")


@pytest.mark.parametrize(
    "text, error",
    [("path,label\na.wav,x\n", "has the columns path,label; expected path,label,speaker"),
     ("", "has the columns (none)"), ("path,label,speaker\n", "has a header and no row"),
     ("path,label,speaker\ngone.wav,x,1\n", "names 1 files that are not in"),
     ("path,label,speaker\n\ngone.wav,,1\n", "line 3: gone.wav has no label"),
     ("path,label,speaker\na.wav,x\n", "line 2: a.wav has no speaker"),
     ("path,label,speaker\nx, y.wav,x,1\n", "line 2: more fields than columns"),
     ('path,label,speaker\na.wav,x,1\n"b.wav,x,1\n', "line 3: not a row of a table"),
     ("path,label,speaker\na.wav,x,1\nb.wav,x,1\n./a.wav,y,2\n", "lines 2 and 4: both are ./a.wav"),
     (SPLIT + "d.wav,x,a,test\n", "fold 0: speaker a is in train and in test"),
     (SPLIT + "d.wav,x,b,train\n", "fold 0: speaker b is in train and in validation"),
     (SPLIT + "d.wav,x,c,Validation\n", "fold 0: speaker c is in validation and in test"),
     (SPLIT + "d.wav,x,d,dev\n", "unknown split 'dev' of d.wav; known: train, validation, test"),
     (SPLIT.replace(",a,", ",Unknown,").replace(",c,", ",Unknown,"), "speaker Unknown is in train and in test"),
     (SPLIT.replace("test", "train"), "found 2 part(s): train, validation; a fold needs three"), (SPLIT, "fine")],
)
def test_csv_errors(tmp_path, text, error):
    text = "path,label,speaker,split\n" + text if text.startswith("ax.wav") else text
    names = ["a.wav", "b.wav", "d.wav", *(f"{s}{n}.wav" for s in "abc" for n in "xy")]
    file = tree(tmp_path, empty(names) | {"mine.csv": text}) / "mine.csv"
    with pytest.raises(InputError, match=re.escape(error)):
        listing = read_corpus("csv", file)
        assert [speakers(listing, fold) for fold in folds(listing)] == [[{"a"}, {"b"}, {"c"}]]
        raise InputError("fine")


def test_counts_are_compared(tmp_path, capsys, monkeypatch):
    counts = zip("WFNT", (127, 71, 79, 62))
    names = [f"wav/{n // 20 + 3:02}a{n % 20:02}{letter}a.wav" for letter, many in counts for n in range(many)]
    read_corpus("emodb", tree(tmp_path, empty(names)), strict=True)  # the four-class part
    assert capsys.readouterr().err == ""
    (tmp_path / names[0]).unlink()
    assert len(read_corpus("emodb", tmp_path).utterances) == 338
    assert re.search("^warning: emodb: found 126 angry.*expected 127 angry", capsys.readouterr().err)
    with pytest.raises(InputError, match="found 126 angry.*expected 127 angry"):
        read_corpus("emodb", tmp_path, strict=True)
    tree(tmp_path, msp_podcast())
    for version in ({"train": 36, "test2": 36}, {"all train": 90, "all validation": 30, "all test1": 90}):
        row = replace(CORPORA["msp-podcast"], counts=({"train": 1}, version))
        monkeypatch.setitem(CORPORA, "msp-podcast", row)
        read_corpus("msp-podcast", tmp_path, strict=True)  # is compared with the version that is nearest


@pytest.mark.parametrize(
    "arguments, said",
    [("--dataset iemocop", f"'iemocop'; known: {', '.join(CORPORA)}"), ("--classes five", "known: four, all"),
     ("--dataset iemocap", "and strange.txt); looked for: Folders Session1 to Session5"), ("--dataset csv", "no file"),
     ("--dataset emodb --root nowhere", "no such folder"), ("--protocol papers", "known: standard, paper"),
     ("--dataset ravdess --protocol paper", "these have: iemocap, msp-improv, msp-podcast")],
)
def test_input_errors_are_one_line(tmp_path, capsys, arguments, said):
    assert features.main(["--root", str(tree(tmp_path, {"strange.txt": None})), *arguments.split()]) == 2
    err = capsys.readouterr().err
    assert said in err and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize("kind, bits", [(1, 8), (1, 16), (1, 24), (1, 32), (3, 32), (3, 64)])
@pytest.mark.parametrize("form", [{}, {"extensible": True}, {"extra": True}])
def test_every_wav_is_read_as_16_khz_mono_and_its_header_tells_the_windows(tmp_path, kind, bits, form):
    rates = [(16000, 800), (16000, 8000), (16000, 8001)] + [(rate, rate) for rate in (8000, 22050, 24000, 44100, 48000)]
    for channels, (rate, length) in product((1, 2, 5), rates):
        x = np.sin(2 * np.pi * 500 * np.arange(length) / rate)
        several = np.stack([0.1 * (k + 1) * x for k in range(channels)], axis=1).ravel()
        path = tree(tmp_path, {"a.wav": riff(several, kind, bits, channels, rate, **form)}) / "a.wav"
        samples, whole = features.read_wav(path), rate == 16000
        assert samples.dtype == np.float32 and len(samples) == length * 16000 / rate
        expected = 0.05 * (channels + 1) * np.sin(2 * np.pi * 500 * np.arange(len(samples)) / 16000)
        difference, bound = np.abs(samples - expected), max(2.0**-bits, 1e-7)
        assert difference.max() <= bound if whole else difference[200:-200].max() < bound + 2e-3
        counted, seconds = features.lengths(Listing("", "", tmp_path, (), [Utterance(path, "a", "s")], ""), 0.5)
        assert counted == len(features.windows(samples, Settings(window=0.5))) and seconds == length / rate


def test_mutated_sounds_are_used_or_refused_without_much_memory(tmp_path):
    def hear():
        samples = features.read_wav(tmp_path / "a.wav")
        assert samples.dtype == np.float32 and samples.ndim == 1 and np.isfinite(samples).all()

    tokens = [b"RF64", b"RIFX", b"data", b"fmt ", b"ds64", struct.pack("<II", 2**32 - 1, 999_983), b"\0\0"]
    tracemalloc.start()
    for kind, bits, extensible in ((1, 8, False), (1, 16, True), (1, 24, False), (3, 32, True), (3, 64, False)):
        sound = riff(np.sin(np.arange(42)) / 2, kind, bits, 1 + bits // 32, 16000, extensible, not extensible)
        feed(tree(tmp_path, {"a.wav": sound}) / "a.wav", 160, hear, tokens)
    assert tracemalloc.get_traced_memory()[1] < 2e8  # no header is believed that announces gigabytes
    tracemalloc.stop()


def test_windows_lose_nothing():
    for length in (10, 15999, 16000, 16001, 32000, 40000):
        samples = np.arange(length, dtype=np.float32)
        cut = features.windows(samples, Settings(window=1.0))
        assert cut.shape == (max(1, -(-length // 16000)), 16000) and set(cut.ravel()) == set(samples)
        assert length < 16000 or cut[-1, -1] == length - 1
        assert length > 16000 or np.array_equal(cut[0], np.tile(samples, 1600)[:16000])


@pytest.mark.parametrize("kind, bands", [("mfcc", 128), ("mfcc", 20), ("log-mel", 64)])
def test_features_are_torchaudios(kind, bands):
    mel, clamp = dict(n_fft=1024, hop_length=250), torchaudio.transforms.AmplitudeToDB(top_db=80)
    oracle = torchaudio.transforms.MFCC(16000, bands, log_mels=False, melkwargs=mel | {"n_mels": 128})
    if kind == "log-mel":
        oracle = nn.Sequential(torchaudio.transforms.MelSpectrogram(16000, n_mels=bands, **mel), clamp)
    for seconds in (0.5, 8.0, 19.3):
        samples = (np.random.default_rng(0).standard_normal(int(16000 * seconds)) * 0.1).astype(np.float32)
        samples[: len(samples) // 2] *= 1e-6  # the clamp at 80 dB counts
        for window in torch.from_numpy(features.windows(samples, Settings())):
            expected = oracle(window)[:, :512].reshape(bands, 128, 4).amax(dim=2)
            close(features.transform(Settings(bands, kind=kind))(window), expected, atol=1e-3, rtol=0)


def test_mfcc_against_its_definition():
    """Power spectrum, triangular bands, decibels within 80 of the loudest, orthonormal DCT-II, maxima of 4 frames."""
    samples = np.random.default_rng(0).standard_normal(32000) * np.linspace(1, 0, 32000) ** 8
    padded = np.pad(samples, 512, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
    power = np.abs(np.stack([np.fft.rfft(window * padded[t : t + 1024]) for t in range(0, 32001, 250)])) ** 2
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 130) / 2595) - 1)  # Hz, equal steps of mel
    hz, (low, mid, high) = np.linspace(0, 8000, 513)[:, None], (edges[:-2], edges[1:-1], edges[2:])
    bands = np.maximum(0, np.minimum((hz - low) / (mid - low), (high - hz) / (high - mid)))
    assert (bands.sum(0) > 0).all()  # no mel band is empty
    db = 10 * np.log10(np.maximum(power @ bands, 1e-10))
    cepstra = scipy.fft.dct(np.maximum(db, db.max() - 80), norm="ortho").T[:, :-1]  # without the frame at the end
    expected = cepstra.reshape(128, 32, 4).max(axis=2)
    for settings in (Settings(window=2.0), Settings(20, 2.0)):
        found = features.transform(settings)(torch.tensor(samples, dtype=torch.float32)).numpy()
        assert found.shape == settings.shape
        np.testing.assert_allclose(found, expected[: settings.coefficients], atol=0.02)


def test_settings_have_names():
    assert Settings.named("log-mel-64", window=4.0) == Settings(64, 4.0, kind="log-mel")
    assert Settings.named("mfcc-128") == Settings()
    names = ("mfcc", "mfcc-0", "mel-64", "log-mel-064", "mfcc-128 ", "mfcc-129", "log-mel-" + "9" * 5000)
    for wrong in (*names, dict(window=0.1), dict(window=math.nan), dict(window=1e300), dict(kind="mel")):
        with pytest.raises(InputError, match="as in log-mel-64 or mfcc-128|expected"):
            Settings.named(wrong) if isinstance(wrong, str) else Settings(**wrong)


def emodb(root, n, sounds={}):
    """n sounds, every 40th of 17 s, and others."""
    names = [f"{k % 3 + 3:02}a{k // 4:02}{'WFNT'[k % 4]}a" for k in range(n)]
    sounds = {name: tone(0.1 if k % 40 else 17, 100 + k) for k, name in enumerate(names)} | sounds
    return read_corpus("emodb", tree(root, {f"wav/{name}.wav": sound for name, sound in sounds.items()}))


def content(cache):
    (folder,) = Path(cache).iterdir()
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def reads(monkeypatch):
    """The recordings that were read."""
    read, paths = features.read_wav, []
    monkeypatch.setattr(features, "read_wav", lambda path: paths.append(path) or read(path))
    return paths


def test_all_bad_files_are_named_at_once(tmp_path, capsys):
    good, lfs = riff(np.zeros(1600)), b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"
    bad = [lfs, good[:1000], b"", b"RIFF", b"fmt \0", riff(b""), b"some text that is no sound", good[:20]]
    bad += [riff(np.array([0, value]), 3, 32) for value in (np.nan, np.inf)]
    bad += [riff(b"\0\0", channels=0), riff(b"\0\0", rate=0)]
    bad = {f"07a{n:02}Wa": sound for n, sound in enumerate(bad)}
    (tmp_path / "wav").mkdir()
    (tmp_path / "wav/07a99Ta.wav").symlink_to("nowhere")
    quiet_or_short = {"03a98Wa": good, "04a98Fa": riff(b"\1\0", rate=44100)}
    listing, cache = emodb(tmp_path, 12, bad | quiet_or_short), tmp_path / "cache"
    assert (features.lengths(listing, 1.0)[0][14:] == 1).all()
    with pytest.raises(InputError) as error:
        load(listing, cache=cache)
    first, *said = str(error.value).split("\n")
    assert first.startswith("13 of 27 recordings") and "--skip-bad" in first and len(said) == 13
    assert all(name in line for name, line in zip([*bad, "07a99Ta"], said))
    assert "git-lfs" in said[0] and "truncated" in said[1]

    store = load(listing, cache=cache, skip_bad=True)
    assert [*store.bad] == [*range(14, 27)] and [*store.bad.values()] == [line.strip() for line in said]
    assert store.features.shape == (16, 128, 128) and np.isfinite(store.features).all()
    made = folds(listing, store.bad, chosen=[0, 1])
    assert [len(fold.tests[fold.name]) for fold in made] == [5, 5, 4, 0] and max(made[0].train) < 14
    with pytest.raises(InputError, match="13 of 27"):  # also when the store is there
        load(listing, cache=cache)
    arguments = ["--dataset", "emodb", "--root", str(tmp_path), "--cache", str(cache), "--skip-bad"]
    assert features.main(arguments) == 0
    assert capsys.readouterr().out.count("skipped   ") == 13
    speaker = {i for i, u in enumerate(listing.utterances) if u.speaker == "04"}
    with pytest.raises(InputError, match="fold 0 has no validation utterance that can be used"):
        folds(listing, speaker)
    parts = folds(listing, speaker, chosen=[2])  # numbers are the listing's
    assert [fold.name for fold in parts] == [fold.name for fold in made] and not parts[1].tests["04"]


KILLED = """import os, signal, features
real, n = features.compute_one, iter(range(99))
features.compute_one = lambda *args: os.kill(os.getpid(), signal.SIGKILL) if next(n) == 20 else real(*args)
features.load(features.read_corpus("emodb", "."), features.Settings(8, 1.0), "cache")"""


def test_a_run_that_was_killed_computes_again(tmp_path, reads):
    """It leaves no store that looks whole; a store that is whole is used where nothing can be written."""
    listing, cache = emodb(tmp_path, 45), tmp_path / "cache"
    assert python("-c", KILLED, cwd=tmp_path).wait() == -signal.SIGKILL
    assert sorted(content(cache)) == ["features.part", "lock"]
    store = load(listing, SHORT, cache)
    assert sorted(content(cache)) == ["features", "index.json", "lock"] and len(reads) == 45
    assert store.features.shape == (43 + 34, 8, 16) and store.seconds.sum() == pytest.approx(43 * 0.1 + 34)
    assert isinstance(store.features, np.memmap)
    window, of = store.windows_of([1, 0])
    assert window.tolist() == [*range(1, 18), 0] and of.tolist() == [0] * 17 + [1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "lock", None)
        assert (load(listing, SHORT, cache).features == store.features).all() and len(reads) == 45


def test_features_are_computed_once_for_each_setting(tmp_path, reads):
    def read(**settings):
        reads.clear()
        load(listing, replace(SHORT, **settings), tmp_path / "cache")
        return len(reads)

    listing = emodb(tmp_path, 12)
    for other in ({}, {"coefficients": 9}, {"window": 2.0}, {"kind": "log-mel"}):
        assert [read(**other), read(**other)] == [12, 0], other
    for seconds, changed in ((0.4, 1), (0.5, 1), (0.5, 2)):  # a recording of another size, or of another time
        tree(tmp_path, {"wav/03a00Wa.wav": tone(seconds)})
        os.utime(tmp_path / "wav/03a00Wa.wav", (changed, changed))
        assert [read(), read()] == [12, 0]


def test_a_store_that_is_not_one_is_refused(tmp_path, monkeypatch):
    def use():
        store = load(listing, SHORT)
        assert len(store.features) == store.first[-1] and len(store.seconds) == 12

    monkeypatch.chdir(tmp_path)
    listing = emodb(tmp_path, 12)
    use()
    (folder,), whole, evil = Path("cache").iterdir(), content("cache"), b"cos\nmkdir\n(S'executed'\ntR." * 99
    for name, data in (("features", b""), ("features", whole["features"][:-1]), ("features", whole["features"] + b"\0"),
                       ("features", evil), ("index.json", whole["index.json"] * 2), ("index.json", evil),
                       ("index.json", b"[" * 99999), ("index.json", b"[[1e99, 0]]")):
        tree(folder, whole | {name: data})
        with pytest.raises(InputError, match="does not hold the features of 12 utterances; delete it"):
            use()
    assert not Path("executed").exists()


def python(*argv, **how):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(features.__file__).parent)}
    return subprocess.Popen([sys.executable, *argv], env=environment, text=True, **how)


def test_two_processes_that_start_together_share_the_work(tmp_path):
    both = [python(features.__file__, cwd=tmp_path, stdout=subprocess.PIPE) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0] and said[0] == said[1]
    assert said[0].startswith("smoke, protocol standard: 168 utterances") and len(content(tmp_path / "cache")) == 3
    assert sorted(path.name for path in (tmp_path / "data/smoke").iterdir()) == ["lock", "wav"]


def test_a_lock_is_free_when_its_process_is_dead_and_everywhere_where_there_are_none(tmp_path, monkeypatch, capsys):
    file = tmp_path / "a/lock"
    with lock(file) as mine, lock(file, wait=False) as other:
        assert mine and not other
    with pytest.raises(KeyError), lock(file):
        raise KeyError
    code = "import os, signal, features\nwith features.lock('a/lock'): os.kill(os.getpid(), signal.SIGKILL)"
    assert python("-c", code, cwd=tmp_path).wait() == -signal.SIGKILL
    with lock(file, wait=False) as mine:
        assert mine and file.exists()

    def flock(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(features.fcntl, "flock", flock)
    for number in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
        with lock(file) as mine:
            assert mine and re.fullmatch(f"warning: {file} cannot be locked .*\n", capsys.readouterr().err)
    number = errno.EIO
    with pytest.raises(OSError), lock(file):
        pass
    monkeypatch.setattr(features, "fcntl", None)
    with lock(file) as mine, lock(file, wait=False) as other:
        assert mine and other


def wav(riff_size, data_size, before=b"", body=b"\1\0" * 800, after=b""):
    head = b"RIFF" + struct.pack("<I", riff_size) + b"WAVE" + riff(b"")[12:36]
    return head + before + b"data" + struct.pack("<I", data_size) + body + after


@pytest.mark.parametrize("content, samples", [
    *((wav(size + 36 & 2**32 - 1, size), 800) for size in (0xFFFFFFFF, 0x7FFFF000, 0x80000000, 0x7FFFFFFF, 0)),
    (wav(0, 0), 800), (wav(12, 1600), 800), (wav(1636, 1600, b"LIST" + struct.pack("<I", 3) + b"abc"), 800),
    (wav(1636, 1600, b"LIST" + struct.pack("<I", 3) + b"abc\0"), 800), (wav(0, 1601, body=b"\1\0" * 800 + b"\1"), 800),
    (wav(9, 1600, b"JUNK" + struct.pack("<I", 9000) + bytes(9000), after=b"LIST\2\0\0\0ab"), 800),
    (wav(1636, 1602), "truncated, 1600 of 1602"), (wav(0xFFFFFFFF, 1602), "truncated"), (wav(36, 0, body=b""), "0 bytes"),
    (wav(36, 0, body=b"LIST\4\0\0\0abcd"), "0 bytes of sound"), (b"RIFF\0\0\0\0WAVE", "no data chunk"),
    (b"RIFF\0\0\0\0WAVEdata\2\0\0\0ab", "0 channels"), (riff(b"ab", kind=7, bits=16), "cannot be decoded"),
    (riff(b"ab").replace(b"\2\0\x10\0data", b"\0\0\x10\0data"), "0 bytes a frame"), (b"ID3" + bytes(99), "not a wav"),
])
def test_what_writers_of_wavs_leave(tmp_path, content, samples):
    """Pipes, broken-off recorders, wrong sizes: to the end of the file; what is cut or empty is refused in words."""
    path = tree(tmp_path, {"a.wav": content}) / "a.wav"
    listing = Listing("", "", tmp_path, (), [Utterance(path, "a", "s")], "")
    if isinstance(samples, str):
        with pytest.raises(InputError, match=f"a.wav: .*{samples}"):
            features.read_wav(path)
        return
    assert len(features.read_wav(path)) == samples and features.lengths(listing, 1.0)[1] == samples / 16000


def test_a_csv_as_people_save_it(tmp_path):
    names = ["a b.wav", "new\nline.wav", "\u0142.wav", "sub/c.wav"]
    table = 'Path;LABEL;Speaker\n"a b.wav";x;1\n;;\n\n"new\nline.wav";y;2\n\u0142.wav;x;3\nsub\\c.wav;y;1\n'
    tree(tmp_path, empty(names))
    file = tmp_path / "mine.csv"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le"):
        for form in (str, lambda t: t.replace(";", ","), lambda t: t.replace(";", "\t")):
            file.write_bytes(form(table).encode(encoding))
            found = [(u.path.relative_to(tmp_path).as_posix(), u.label, u.speaker) for u in features.index_csv(file)]
            assert found == list(zip(names, "xyxy", "1231"))
    file.write_bytes("path,label,speaker\r\na b.wav,w\xfctend,1\r\n".encode("latin-1"))
    assert [u.label for u in features.index_csv(file)] == ["w\xfctend"]


def test_the_same_recording_is_on_one_side_only(tmp_path):
    sounds = {f"{s}{n}.wav": tone(0.1, 100 + 9 * n + ord(s)) for s in "abc" for n in range(2)}
    rows = [f"{name},{'xy'[int(name[1])]},{name[0]}" for name in sounds]
    file = tree(tmp_path, sounds | {"mine.csv": "\n".join(["path,label,speaker", *rows])}) / "mine.csv"
    listing = read_corpus("csv", file)
    fold, digest = folds(listing)[0], listing.digest
    (tmp_path / "copy.wav").write_bytes(sounds["b0.wav"])
    file.write_text("\n".join(["path,label,speaker", *rows, "copy.wav,x,b"]))
    assert len(folds(read_corpus("csv", file))) == 3  # on one side
    assert read_corpus("csv", file).digest != digest
    file.write_text("\n".join(["path,label,speaker", *rows, "copy.wav,x,c"]))
    with pytest.raises(InputError, match="fold 0: one recording, b0.wav and copy.wav, is in|copy.wav and b0.wav, is in"):
        folds(read_corpus("csv", file))


