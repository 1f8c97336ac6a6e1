"""Tests of features.py."""

import errno
import os
import re
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import scipy.fft
import torch
import torchaudio

import features
from features import CORPORA, InputError, Listing, Settings, Utterance, folds, load, lock, read_corpus

SHORT, HEAD = Settings(8, 1.0), "path,label,speaker\n"
SPLIT = [f"{s}{n}.wav,{n},{s},{part}\n" for s, part in zip("abc", ("train", "validation", "test")) for n in "xy"]
SPLIT = "".join(["path,label,speaker,split\n", *SPLIT])
TOKENS = [*",;\t\n\r\"/[\0", "A" * 5000, '"' + "x" * 140_000, "..", "Train", "\u0663", "\u017f", "Unknown"]
PCM = b"\1\0" * 800
WAV_TOKENS = ["RF64", "RIFX", "data", "fmt ", "ds64", "\x7f" * 4 + "\0\0\1\0", "\0\0"]


def tree(root, files, empty=()):
    """Writes {path below the root: text or bytes} and empty files. -> root"""
    for name, content in [*files.items(), *((name, b"") for name in empty)]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def riff(x, kind=1, bits=16, channels=1, rate=16000, extensible=False, size=None, before=b"", after=b""):
    """A wav file of samples, or of bytes as they are; with other chunks, and a size that is not theirs."""
    if not isinstance(x, bytes) and kind == 3:
        x = x.astype(f"<f{bits // 8}").tobytes()
    elif not isinstance(x, bytes):  # whole numbers, of which the lower bytes come first; 8 bits have no sign
        whole = np.round(x * 2.0 ** (bits - 1) + (128 if bits == 8 else 0)).astype("<i8")
        x = whole.view(np.uint8).reshape(-1, 8)[:, : bits // 8].tobytes()
    block = channels * bits // 8
    form = struct.pack("<HHIIHH", 0xFFFE if extensible else kind, channels, rate, rate * block, block, bits)
    if extensible:
        form += struct.pack("<HHIH", 22, bits, 0, kind) + b"\x00\x00\x00\x00\x10\x00\x80\x00\x00\xaa\x00\x38\x9b\x71"
    size, riff_size = (len(x), len(x) + len(form) + 20) if size is None else (size, 0)
    head = b"RIFF" + struct.pack("<I", riff_size) + b"WAVEfmt " + struct.pack("<I", len(form)) + form + before
    return head + b"data" + struct.pack("<I", size) + x + b"\0" * (len(x) == size and size % 2) + after


def speakers(listing):
    """Of each fold: those of training, validation and each test set."""
    return [[{listing.utterances[i].speaker for i in side} for _, side in fold.sides()] for fold in folds(listing)]


def check(root, dataset, wanted, groups, tested=None, **choice):
    """-> Listing of {name: label}, where that is a class; in its folds the groups test and the next one validates."""
    listing = read_corpus(dataset, root, **choice)
    known = {*wanted.values()} if choice.get("classes") == "all" or dataset == "csv" else features.CLASSES
    found = sorted((u.path.name, u.label) for u in listing.utterances)
    assert found == sorted((name, label) for name, label in wanted.items() if label and label in known)
    turns = [({*groups[k]}, {*groups[(k + 1) % len(groups)]}) for k in tested or range(len(groups))]
    assert speakers(listing) == [[set().union(*groups) - test - valid, valid, test] for test, valid in turns]
    return listing


def feed(path, many, use, tokens=TOKENS, answers=(True, "refused")):
    """A file, then its mutants (bytes changed, cut, repeated, tokens of its format) are used or refused within 5 s."""
    content, found, random = path.read_bytes(), set(), np.random.default_rng(0)
    for k in range(many + 1):
        mutant, at = bytearray(content), None
        for _ in range(random.integers(1, 5) if k else 0):  # the file itself comes first
            at, n = int(random.integers(len(mutant) + 1)), int(random.integers(1, 9))
            new = [bytes(random.integers(0, 256, n, dtype=np.uint8)), bytes(mutant[:at][-50:]), b"\xff" * n, b"\0" * n]
            new += [b"", b"\x7f\xff\xff\xff"] + [tokens[random.integers(len(tokens))].encode()] * 3
            mutant[at : at + n * int(random.integers(2))] = new[random.integers(len(new))]
        path.write_bytes(mutant[: at if random.integers(8) == 0 else None])
        started = time.perf_counter()
        try:
            found.add(bool(use()))
        except InputError:
            found.add("refused")
        assert time.perf_counter() - started < 5, mutant
    assert found == {*answers}


@pytest.mark.parametrize("depth", ["", "a/b/"])
@pytest.mark.parametrize("dataset, form, groups, codes", [
    ("emodb", "{}a01{}a.WAV", [["03"], ["08"], ["10"]],
     dict(W="angry", F="happy", N="neutral", T="sad", A="fear", E="disgust", L="boredom")),
    ("ravdess", "03-01-{1}-01-02-01-{0}.wav", [[f"{k + a:02}" for a in range(4)] for k in range(1, 25, 4)],
     dict(zip((f"0{n}" for n in range(1, 9)), "neutral calm happy sad angry fear disgust surprise".split()))),
    ("crema-d", "{}_DFA_{}_XX.wav", np.split(np.arange(1001, 1092).astype(str), [18, 36, 54, 72]),
     dict(ANG="angry", DIS="disgust", FEA="fear", HAP="happy", NEU="neutral", SAD="sad")),
    ("nemo", "{}_{}_1.wav", [["EB0"], ["EC0"], ["WR0"]],
     dict(anger="angry", fear="fear", happiness="happy", neutral="neutral", sadness="sad", surprised="surprise")),
])
def test_free_corpora(tmp_path, depth, dataset, form, groups, codes):
    wanted = {form.format(s, code): codes[code] for group in groups for s in group for code in codes}
    table = "file_id\temotion\traw_text\tnormalized_text\tspeaker_id\tgender\tage\r\n"
    for name in [*wanted, "WR0_fear_9.wav"] if dataset == "nemo" else []:
        table += f'{name}\t{name.split("_")[1]}\t"Tak\ttak\t        {name[:3]}\tmale\t23\r\n'
    first = min(wanted)
    names = [".DS_Store", "notes.wav", "03-02-05-01-01-01-01.wav", "x_anger_1.wav", f"._{first}", f".git/{first}"]
    names = [f"{depth}samples/{name}" for name in [*wanted, *names, *(f"again/{name}" for name in wanted)]]
    tree(tmp_path, {f"{depth}data.tsv": table}, names)
    assert len(features.below(tmp_path, re.escape(first))) == 2  # of which a corpus has one
    assert check(tmp_path, dataset, wanted, groups, classes="all").classes == tuple(sorted({*wanted.values()}))
    check(tmp_path, dataset, wanted, groups)


def test_iemocap(tmp_path, capsys):
    files, wanted, paper, names = {}, {}, {}, []
    codes = dict(ang="angry", hap="happy", exc="happy", neu="neutral", sad="sad", fru="frustrated", xxx=None, oth=None)
    for s, scene in product("12345", ("impro04", "script01_1b")):
        dialog, text = f"Ses0{s}F_{scene}", ["% [START_TIME - END_TIME] TURN_NAME EMOTION"]
        for (n, code), who in product(enumerate(codes), "FM"):  # the last letter tells who speaks
            turn = f"{dialog}_{who}{n:03}"
            text += [f"[6.2901 - 8.2357]\t{turn}\t{code}\t[2.5000, 2.5000, 2.5000]", "C-E2:\tNeutral;\t()", "\xe9", ""]
            names += [f"a/b/Session{s}/sentences/wav/{dialog}/{turn}.wav"]
            wanted[f"{turn}.wav"] = codes[code]
            paper[f"{turn}.wav"] = codes[code] if scene == "impro04" and code != "exc" else None
        folder = f"a/b/Session{s}/dialog"
        names += [f"{folder}/wav/{dialog}.wav", f"{folder}/transcriptions/{dialog}.txt"]  # the label file's name
        names += [f"{folder}/EmoEvaluation/Categorical/{dialog}_e1.txt", f"{folder}/EmoEvaluation/._{dialog}.txt"]
        files[f"{folder}/EmoEvaluation/{dialog}.txt"] = "\r\n".join(text).encode("latin-1")
    tree(tmp_path, files, names)
    sessions, pairs = [(f"{s}F", f"{s}M") for s in range(1, 6)], [(f"{s}M", f"{s % 5 + 1}F") for s in range(1, 6)]
    check(tmp_path, "iemocap", wanted, sessions, classes="all")
    check(tmp_path, "iemocap", wanted, sessions)
    check(tmp_path, "iemocap", paper, pairs, protocol="paper")
    (tmp_path / "a/b/Session3/sentences/wav/Ses03F_impro04/Ses03F_impro04_F000.wav").unlink()
    assert len(read_corpus("iemocap", tmp_path).utterances) == 99 and "1 of 160 labels" in capsys.readouterr().err
    feed(tmp_path / [*files][0], 20, lambda: folds(read_corpus("iemocap", tmp_path, "all", "paper")), answers=[True])


@pytest.mark.parametrize("name", ["Evalution.txt", "labels/evaluation.TXT"])
def test_msp_improv(tmp_path, name):
    names, text, rated, read = [], "", {}, {}
    codes = dict(A="angry", H="happy", N="neutral", S="sad", X=None, O=None)
    for s, who, letter, condition in product(range(1, 7), "FM", "AHNS", "RST"):
        stem = f"IMPROV-S01{letter}-{who}{s:02}-{condition}-FM01"
        names += [f"a/MSP/Audio/session{s}/S01{letter}/{condition}/MSP-{stem}.{kind}" for kind in ("wav", "avi")]
        heard = {"T": "X", "S": "O", "R": "N"}[condition] if letter == "S" else letter
        text += f"UTD-{stem}.avi; {heard}; A:3.333333; V:NaN; D:3.000000 ; N:3.666667;\r\n"
        text += "WORKER00000001; Angry; Angry,Frustrated; A:3.000000; V:2.000000; D:3.000000; N:4.000000;\r\n\r\n"
        rated[f"MSP-{stem}.wav"] = codes[heard]
        read[f"MSP-{stem}.wav"] = codes[letter] if condition == "R" else None  # the intended emotion of what was read
    tree(tmp_path, {f"a/MSP/{name}": text}, names)
    sessions = [(f"F{s:02}", f"M{s:02}") for s in range(1, 7)]
    assert check(tmp_path, "msp-improv", rated, sessions).classes == features.CLASSES  # four, though nobody is sad
    check(tmp_path, "msp-improv", read, sessions, tested=(0, 1, 2, 4), protocol="paper")
    feed(tmp_path / "a/MSP" / name, 120, lambda: folds(read_corpus("msp-improv", tmp_path, "all", "paper")))


@pytest.mark.parametrize("form", ["L/labels_consensus.csv Audios Development", "labels_Concensus.csv Audio Validation"])
def test_msp_podcast(tmp_path, capsys, monkeypatch, form):
    labels, audio, validation = form.split()
    text = "FileName,EmoClass,EmoAct,SpkrID,Gender,Split_Set\r\nMSP-PODCAST_test3_0002.wav,N,2.2,9,Male,Test3\r\n"
    names = [f"{audio}/MSP-PODCAST_test3_0001.wav", f"{audio}/._MSP-PODCAST_0000_6500.wav"]
    sides = f"Train Train Train {validation} Test1 Test1 Test1 Test2 Test2 Test2".split()
    for (k, who), code, n in product(enumerate("1 2 Unknown 3 4 7 Unknown 4 5 6".split()), "AHNSUFDCOX", range(3)):
        names.append(f"{audio}/part{k % 2}/MSP-PODCAST_{k:04}_{ord(code):02}{n:03}.wav")
        text += f"{names[-1][-26:]},{code},2.2,{who},Male,{sides[k]}\r\n"
    table = tree(tmp_path, {f"a/{labels}": "\ufeff" + text}, [f"a/{name}" for name in names]) / "a" / labels
    standard = read_corpus("msp-podcast", tmp_path)
    assert sorted(u.label for u in standard.utterances) == sorted(30 * features.CLASSES)
    assert len(read_corpus("msp-podcast", tmp_path, classes="all").classes) == 8
    (fold,) = folds(standard)  # one, as the two test sets are tested with one training
    assert [*fold.tests] == ["test1", "test2"] and fold.name == "test1, test2"
    assert speakers(standard) == [[{"1", "2", "Unknown"}, {"3"}, {"4", "7", "Unknown"}, {"4", "5", "6"}]]
    said = "\n".join(features.describe(standard, [fold], features.Store(None, np.arange(121), np.ones(120), {})))
    assert "speakers  7: 1, 2, 3, 4, 5, 6, 7\n" in said and "unknown   24 utterances" in said
    assert "test1 4, 7, Unknown (36), test2 4, 5, 6 (36), validation 3 (12), training 36" in said
    # Paper: pools what is not for validation; no side has more than it may, drawn without any global state.
    monkeypatch.setattr(features.random, "random", None)
    paper = read_corpus("msp-podcast", tmp_path, protocol="paper")
    whole = folds(paper)
    assert [fold.name for fold in whole] == ["1", "2", "4", "5", "6", "7"]  # neither Unknown nor Development
    for version in ({"train": 36, "angry": 30, "recordings": 300}, {"all train": 90, "all validation": 30}):
        corpus = replace(CORPORA["msp-podcast"], at_most=7, counts=({"train": 1}, version))
        monkeypatch.setitem(CORPORA, "msp-podcast", corpus)
        read_corpus("msp-podcast", tmp_path, strict=True)  # is compared with the version that is nearest
    monkeypatch.setitem(CORPORA, "msp-podcast", replace(corpus, counts=({"train": 36, "angry": 31},)))
    with pytest.raises(InputError, match="found 36 train, 30 angry; expected 36 train, 31 angry"):
        read_corpus("msp-podcast", tmp_path, strict=True)
    assert folds(paper) == folds(paper)
    for before, after in zip(whole, folds(paper)):
        for (_, everyone), (_, some) in zip(before.sides(), after.sides()):
            assert len(some) == 7 and set(some) < set(everyone) and some != everyone[:7]
    # Of those who train, let speaker 1 be 4 now and then, who also tests, and 2 be 3, who validates.
    text = text.replace(",1,Male,Train", ",4,Male,Train", 5).replace(",2,Male,Train", ",3,Male,Train", 6)
    table.write_text(text)
    listing, left_out = read_corpus("msp-podcast", tmp_path), len(re.findall(r",[AHNS],.*,[34],Male,Train", text))
    assert left_out > 5 and re.search(f"found 36 train(.|\n)*podcast: {left_out} utterances", capsys.readouterr().err)
    assert speakers(listing)[0][:2] == [{"1", "2", "Unknown"}, {"3"}]
    feed(table, 30, lambda: folds(read_corpus("msp-podcast", tmp_path)))


def test_csv_and_ctrl_c(tmp_path, monkeypatch, capsys):
    wanted = {f"{s}{label}.wav": label for s in "abc" for label in ("zen", "awe")}
    few = [f"sounds/{name},{label},{name[0]}" for name, label in wanted.items()]
    many = [f"{s}_{n}.wav,{'xy'[n % 2]},{s}" for s in range(12) for n in range(s + 1)]
    names = [row.split(",")[0] for row in few + many + SPLIT.split()]
    file = tree(tmp_path, {"mine.csv": HEAD + "\n".join(few)}, names) / "mine.csv"
    listing = check(file, "csv", wanted, "abc")
    assert listing.classes == ("awe", "zen") and listing.name(listing.utterances[0]) == "sounds/aawe.wav"
    feed(file, 200, lambda: folds(read_corpus("csv", file)))
    file.write_text(HEAD + "\n".join(many))
    sizes = [len(fold.tests[fold.name]) for fold in folds(read_corpus("csv", file))]
    assert len(sizes) == 5 and sum(sizes) == 78 and max(sizes) - min(sizes) <= 4
    file.write_text(SPLIT)
    assert speakers(read_corpus("csv", file)) == [[{"a"}, {"b"}, {"c"}]]
    monkeypatch.setattr(features, "load", Mock(side_effect=KeyboardInterrupt))
    assert features.main(["--dataset", "csv", "--root", str(file)]) == 130
    assert capsys.readouterr() == ("", "\nstopped\n")


@pytest.mark.parametrize("given, error", [
    ("--dataset iemocop", f"'iemocop'; known: {', '.join(CORPORA)}"), ("--classes five", "known: four, all"),
    ("--dataset iemocap", "and 3 more.; looked for: Folders Session1 to Session5"), ("--dataset csv", "no file"),
    ("--dataset emodb --root nowhere", "no such folder"), ("--protocol papers", "known: standard, paper"),
    ("--dataset ravdess --protocol paper", "have: iemocap, msp-improv, msp-podcast"), ("", "has the columns .none"),
    ("path,label\na.wav,x\n", "has the columns path,label; expected path,label,speaker"),
    (HEAD + "\nx.wav,,1\n", "line 3: x.wav has no label"), (HEAD + "a.wav,x\n", "line 2: a.wav has no speaker"),
    (HEAD + "x, y.wav,x,1\n", "line 2: more fields"), (HEAD + 'a.wav,x,1\n"b.wav,x,1\n', "line 3: not a row"),
    (HEAD + "ax.wav,x,1\nay.wav,x,1\n./ax.wav,y,2\n", "lines 2 and 4: both are ./ax.wav"), (HEAD, "and no row"),
    (SPLIT + "d.wav,x,a,test\n", "r a is .*train.*test"), (SPLIT + "d.wav,x,c,Validation\n", "r c is .*vali.*test"),
    (SPLIT + "d.wav,x,d,dev\n", "line 8: unknown split 'dev' of d.wav; known"), (HEAD + "g,x,1\n", "names 1 file"),
    (SPLIT.replace(",a,", ",Unknown,").replace(",c,", ",Unknown,"), "speaker Unknown is in .*train and in .*test"),
    (SPLIT.replace("test", "train"), "found 2 part.s.: train, validation; a fold needs three"),
])
def test_input_errors_are_one_line(tmp_path, capsys, given, error):
    tree(tmp_path, {"mine.csv": given}, ["d.wav", *(row.split(",")[0] for row in SPLIT.split()[1:])])
    options = given.split() if given[:2] == "--" else ["--dataset", "csv", "--root", f"{tmp_path}/mine.csv"]
    assert features.main(["--root", str(tmp_path), *options]) == 2
    assert re.fullmatch(f"error: .*{error}.*\n", capsys.readouterr().err)


def test_a_csv_as_people_save_it_and_one_with_a_recording_twice(tmp_path):
    names = ["a b.wav", "new\nline.wav", "\u0142.wav", "sub/c.wav"]
    table = 'Path;LABEL;Speaker\n"a b.wav";x;1\n;;\n\n"new\nline.wav";y;2\n\u0142.wav;x;3\nsub\\c.wav;y;1\n'
    file = tree(tmp_path, {}, names) / "mine.csv"
    for encoding, separator in product(("utf-8", "utf-8-sig", "utf-16", "utf-16-le"), ";,\t"):
        file.write_bytes(table.replace(";", separator).encode(encoding))
        found = [(u.path.relative_to(tmp_path).as_posix(), u.label, u.speaker) for u in features.index_csv(file)]
        assert found == list(zip(names, "xyxy", "1231"))
    file.write_bytes(f"{HEAD}a b.wav,w\xfctend,1\r\n".encode("latin-1"))
    assert [u.label for u in features.index_csv(file)] == ["w\xfctend"]
    # The same recording is on one side only; the digest changes with the content.
    sounds = {f"{s}{n}.wav": riff(f"{s}{n}".encode() * 800) for s in "abc" for n in "xy"}
    text = HEAD + "".join(f"{name},{name[1]},{name[0]}\n" for name in sounds)
    file = tree(tmp_path, sounds | {"copy.wav": sounds["bx.wav"], "mine.csv": text + "copy.wav,x,b\n"}) / "mine.csv"
    listing = read_corpus("csv", file)
    assert len(folds(listing)) == 3
    tree(tmp_path, {"ax.wav": riff(b"__" * 800)})  # other samples, as many
    assert read_corpus("csv", file).digest != listing.digest
    file.write_text(text + "copy.wav,x,c\n")
    with pytest.raises(InputError, match="one recording, (bx.wav and copy|copy.wav and bx).wav, is in "):
        folds(read_corpus("csv", file))


def hear(path):
    """-> samples and windows of a wav file; its header alone tells how many they are."""
    samples, listing = features.read_wav(path), Listing("", "", path.parent, (), [Utterance(path, "a", "s")], "")
    cut, (counted, seconds) = features.windows(samples, Settings(window=0.5)), features.lengths(listing, 0.5)
    assert samples.dtype == np.float32 and samples.ndim == 1 and counted == len(cut)
    return samples, cut, float(seconds[0])


@pytest.mark.parametrize("kind, bits", [(1, 8), (1, 16), (1, 24), (1, 32), (3, 32), (3, 64)])
@pytest.mark.parametrize("extensible", [False, True])
def test_every_wav_is_read_as_16_khz_mono_windows_lose_nothing_mutants_are_refused(tmp_path, kind, bits, extensible):
    path, rates = tmp_path / "a.wav", [(rate, rate) for rate in (8000, 22050, 24000, 44100, 48000)] + [(16000, 20001)]
    for channels, (rate, n) in product((1, 2, 5), [(16000, 9), (16000, 800), (16000, 8000), (16000, 8001), *rates]):
        several = np.outer(np.sin(2 * np.pi * 500.7 * np.arange(n) / rate), 0.1 * np.arange(1, channels + 1)).ravel()
        path.write_bytes(riff(several, kind, bits, channels, rate, extensible))
        samples, cut, seconds = hear(path)
        assert len(samples) == n * 16000 / rate and seconds == n / rate
        expected = 0.05 * (channels + 1) * np.sin(2 * np.pi * 500.7 * np.arange(len(samples)) / 16000)
        difference, bound = np.abs(samples - expected), 2.0**-bits + 1e-7
        assert difference.max() <= bound if rate == 16000 else difference[200:-200].max() < 2 * bound + 2e-3
        whole = np.resize(samples, max(8000, len(samples)))  # a short one is repeated, a last window overlaps
        assert np.array_equal(np.concatenate([*cut[:-1], cut[-1][cut.size - whole.size :]]), whole)
    path.write_bytes(riff(np.sin(np.arange(42)) / 2, kind, bits, 1 + bits // 32, 16000, extensible))
    tracemalloc.start()
    feed(path, 80, lambda: bool(np.isfinite(hear(path)[0]).all()), WAV_TOKENS)
    assert tracemalloc.get_traced_memory()[1] < 2e8  # no header is believed that announces gigabytes
    tracemalloc.stop()


@pytest.mark.parametrize("content, samples", [
    *((riff(PCM, size=size), 800) for size in (0xFFFFFFFF, 0x7FFFF000, 0x80000000, 0, 1600)),
    (riff(PCM, size=1600, before=b"LIST\3\0\0\0abc"), 800), (riff(PCM, size=1600, before=b"LIST\3\0\0\0abc\0"), 800),
    (riff(PCM, size=1600, before=b"JUNK\x28\x23\0\0" + bytes(9000), after=b"LIST\2\0\0\0ab"), 800),
    (riff(PCM + b"\1", size=1601), 800), (riff(PCM, size=1602), "truncated, 1600 of 1602"), (riff(b""), "0 bytes"),
    (riff(b"", size=0, after=b"LIST\4\0\0\0abcd"), "0 bytes of sound"), (b"RIFF\0\0\0\0WAVE", "no data chunk"),
    (b"RIFF\0\0\0\0WAVEdata\2\0\0\0ab", "0 channels"), (riff(b"ab", kind=7), "cannot be decoded"),
    (riff(b"ab").replace(b"\2\0\x10\0data", b"\0\0\x10\0data"), "0 bytes a frame"),
])
def test_what_writers_of_wavs_leave(tmp_path, content, samples):
    path = tree(tmp_path, {"a.wav": content}) / "a.wav"
    with pytest.raises(InputError, match=f"a.wav: .*{samples}") if isinstance(samples, str) else nullcontext():
        assert len(hear(path)[0]) == samples and hear(path)[2] == samples / 16000


def test_features_are_as_defined_and_as_torchaudios_and_settings_have_names():
    """Power spectrum, triangular bands, decibels within 80 of the loudest, orthonormal DCT-II, maxima of 4 frames."""
    samples = np.random.default_rng(0).standard_normal(32000) * np.linspace(1, 0, 32000) ** 8
    padded, window = np.pad(samples, 512, mode="reflect"), 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
    power = np.abs(np.stack([np.fft.rfft(window * padded[t : t + 1024]) for t in range(0, 32001, 250)])) ** 2
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 130) / 2595) - 1)  # Hz, equal steps of mel
    hz, (low, mid, high) = np.linspace(0, 8000, 513)[:, None], (edges[:-2], edges[1:-1], edges[2:])
    bands = np.maximum(0, np.minimum((hz - low) / (mid - low), (high - hz) / (high - mid)))
    db = 10 * np.log10(np.maximum(power @ bands, 1e-10))
    cepstra = scipy.fft.dct(np.maximum(db, db.max() - 80), norm="ortho").T[:, :-1]  # without the frame at the end
    found = features.transform(Settings(20, 2.0))(torch.tensor(samples, dtype=torch.float32)).numpy()
    np.testing.assert_allclose(found, cepstra.reshape(128, 32, 4).max(axis=2)[:20], atol=0.02)
    samples = (np.random.default_rng(0).standard_normal(int(16000 * 19.3)) * 0.1).astype(np.float32)
    samples[: len(samples) // 2] *= 1e-6  # the clamp at 80 dB counts
    mel, clamp = dict(n_fft=1024, hop_length=250), torchaudio.transforms.AmplitudeToDB(top_db=80)
    mfcc = torchaudio.transforms.MFCC(16000, 128, log_mels=False, melkwargs=mel | {"n_mels": 128})
    log_mel = torch.nn.Sequential(torchaudio.transforms.MelSpectrogram(16000, n_mels=64, **mel), clamp)
    oracles = {Settings(): mfcc, Settings(64, kind="log-mel"): log_mel}
    for window, (settings, oracle) in product(torch.from_numpy(features.windows(samples, Settings())), oracles.items()):
        expected = oracle(window)[:, :512].unflatten(1, (128, 4)).amax(dim=2)
        torch.testing.assert_close(features.transform(settings)(window), expected, atol=1e-3, rtol=0)
    assert Settings.named("log-mel-64", window=4.0) == Settings(64, 4.0, "log-mel") and Settings().shape == (128, 128)
    names = ("mfcc", "mfcc-0", "mel-64", "log-mel-064", "mfcc-128 ", "mfcc-129", "log-mel-" + "9" * 5000)
    for wrong in (*names, dict(window=0.1), dict(window=np.nan), dict(window=1e300), dict(kind="mel")):
        with pytest.raises(InputError, match="as in log-mel-64 or mfcc-128|expected"):
            Settings.named(wrong) if isinstance(wrong, str) else Settings(**wrong)


def emodb(root, n, sounds={}):
    """n sounds, every 40th of 17 s, and others."""
    for k in range(n):
        sound = riff(np.sin(np.arange(1600 if k % 40 else 272_000) * (k + 9) / 99) / 2)
        sounds = {f"{k % 3 + 3:02}a{k // 4:02}{'WFNT'[k % 4]}a": sound} | sounds
    return read_corpus("emodb", tree(root, {f"wav/{name}.wav": sound for name, sound in sounds.items()}))


def test_all_bad_files_are_named_at_once(tmp_path, capsys):
    good, lfs = riff(bytes(3200)), b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"
    bad = [lfs, good[:1000], b"", b"RIFF", riff(b""), b"some text that is no sound", good[:20], riff(PCM, channels=0)]
    bad += [riff(PCM, rate=0), *(riff(np.array([0, value]), 3, 32) for value in (np.nan, np.inf, 1e30))]
    bad = {f"07a{n:02}Wa": sound for n, sound in enumerate(bad)}
    (tmp_path / "wav").mkdir()
    (tmp_path / "wav/07a99Ta.wav").symlink_to("nowhere")
    listing, cache = emodb(tmp_path, 12, bad | {"03a98Wa": good, "04a98Fa": riff(b"\1\0", rate=44100)}), tmp_path / "c"
    for _ in range(2):  # also when the store is there
        with pytest.raises(InputError) as error:
            load(listing, cache=cache)
    first, *said = str(error.value).split("\n")
    assert first.startswith("13 of 27 recordings") and "git-lfs" in said[0] and "truncated" in said[1]
    assert [re.search(r"07a\d\d.a", line)[0] for line in said] == [*bad, "07a99Ta"]
    store = load(listing, cache=cache, skip_bad=True)
    assert store.bad == dict(zip(range(14, 27), map(str.strip, said)))
    assert (features.lengths(listing, 1.0)[0][14:] == 1).all()
    assert store.features.shape == (16, 128, 128) and np.isfinite(store.features).all()
    made = folds(listing, store.bad, chosen=[0, 1])
    assert [len(fold.tests[fold.name]) for fold in made] == [5, 5, 4, 0] and max(made[0].train) < 14
    arguments = ["--dataset", "emodb", "--root", str(tmp_path), "--cache", str(cache), "--skip-bad"]
    assert features.main(arguments) == 0 and capsys.readouterr().out.count("skipped   ") == 13
    speaker = {i for i, u in enumerate(listing.utterances) if u.speaker == "04"}
    with pytest.raises(InputError, match="fold 0 has no validation utterance that can be used"):
        folds(listing, speaker)
    parts = folds(listing, speaker, chosen=[2])  # numbers are the listing's
    assert [fold.name for fold in parts] == [fold.name for fold in made] and not parts[1].tests["04"]


def python(*argv, **how):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(features.__file__).parent)}
    return subprocess.Popen([sys.executable, *argv], env=environment, text=True, **how)


def test_features_are_computed_once_and_again_where_a_run_was_killed_or_the_store_is_not_one(tmp_path, monkeypatch):
    def read(**settings):
        before = reads.call_count
        load(listing, replace(SHORT, **settings))
        return reads.call_count - before

    monkeypatch.chdir(tmp_path)
    listing, reads = emodb(tmp_path, 45), Mock(side_effect=features.read_wav)
    monkeypatch.setattr(features, "read_wav", reads)
    code = "import os, features\nfeatures.load(features.read_corpus('emodb', '.'), features.Settings(8, 1.0), "
    code += "progress=lambda text: os.kill(os.getpid(), 9))"
    assert python("-c", code).wait() == -signal.SIGKILL
    (folder,) = Path("cache").iterdir()
    assert sorted(os.listdir(folder)) == ["features.part", "lock"]
    assert read() == 45 and sorted(os.listdir(folder)) == ["features", "index.json", "lock"]
    with monkeypatch.context() as patch:
        patch.setattr(features, "lock", None)  # where nothing can be written
        store = load(listing, SHORT)
    assert store.features.shape == (43 + 34, 8, 16) and store.seconds.sum() == pytest.approx(43 * 0.1 + 34)
    assert [each.tolist() for each in store.windows_of([1, 0])] == [[*range(1, 18), 0], [0] * 17 + [1]]
    assert isinstance(store.features, np.memmap) and read() == 0
    for other in ({"coefficients": 9}, {"window": 2.0}, {"kind": "log-mel"}):
        assert [read(**other), read(**other)] == [45, 0], other
    values, index = [(folder / name).read_bytes() for name in ("features", "index.json")]
    evil = b"cos\nmkdir\n(S'executed'\ntR." * 99
    spoilt = [(b"", index), (values[:-1], index), (values + b"\0", index), (evil, index)]
    for pair in (*spoilt, (values, index * 2), (values, evil), (values, b"[" * 99999), (values, b"[[1e99, 0]]")):
        tree(folder, dict(zip(("features", "index.json"), pair)))
        with pytest.raises(InputError, match="does not hold the features of 45 utterances; delete it"):
            read()
    assert not Path("executed").exists()
    for seconds, changed in ((0.4, 1), (0.5, 1), (0.5, 2)):  # a recording of another size, or of another time
        tree(tmp_path, {"wav/03a00Wa.wav": riff(bytes(int(32000 * seconds)))})
        os.utime("wav/03a00Wa.wav", (changed, changed))
        assert [read(), read()] == [45, 0]


def test_two_processes_share_the_work_and_locks_are_free_where_one_died_or_none_are(tmp_path, monkeypatch, capsys):
    both = [python(features.__file__, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    (out, err), (other, more) = [process.communicate() for process in both]
    assert out == other and out.startswith("smoke, protocol standard: 168 ") and (err + more).count("168/168") == 1
    assert len([*tmp_path.glob("cache/*/*")]) == 3 and sorted(os.listdir(tmp_path / "data/smoke")) == ["lock", "wav"]
    file = tmp_path / "a/lock"
    with lock(file) as mine, lock(file, wait=False) as other:
        assert mine and not other
    code = "import os, signal, features\nwith features.lock('a/lock'): os.kill(os.getpid(), signal.SIGKILL)"
    assert python("-c", code, cwd=tmp_path).wait() == -signal.SIGKILL
    with lock(file, wait=False) as mine:
        assert mine and file.exists()
    for number in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
        monkeypatch.setattr(features.fcntl, "flock", Mock(side_effect=OSError(number, "none")))
        with lock(file) as mine:
            assert mine and re.fullmatch(f"warning: {file} cannot be locked .*\n", capsys.readouterr().err)
    monkeypatch.setattr(features, "fcntl", None)
    with lock(file) as mine, lock(file, wait=False) as other:
        assert mine and other
