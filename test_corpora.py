"""Small trees in each corpus' exact layout, with the quirks of real copies; audio formats; bad files; the store."""

import itertools
import json
import os
import re
import signal
import struct
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchaudio
from scipy.io import wavfile

import features
from features import CORPORA, InputError, Settings, folds, load, read_corpus


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def tone(path, seconds=0.3, rate=16000, frequency=440):
    path.parent.mkdir(parents=True, exist_ok=True)
    wavfile.write(path, rate, (16000 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)).astype(np.int16))
    return path


def labels(listing):
    return {u.path.name: u.label for u in listing.utterances}


def speakers(listing, fold):
    """(train, validation, test) as sets of speakers."""
    return tuple({listing.utterances[i].speaker for i in side} for side in (fold.train, fold.validation, fold.test))


# ---------------------------------------------------------------------------------------------------------------------
# Corpora


@pytest.mark.parametrize("depth", ["", "wav", "a/b/wav"])
def test_emodb(tmp_path, depth):
    root = tmp_path / depth
    names = [f"{s}a01{letter}a.wav" for s in ("03", "08", "10") for letter in "WFNTAEL"]
    touch(*(root / name for name in names), root / "._03a01Wa.wav", root / ".DS_Store", root / "03a02Wb.WAV", root / "notes.wav")
    four = read_corpus("emodb", tmp_path)
    assert labels(four)["03a01Wa.wav"] == "angry" and labels(four)["03a02Wb.WAV"] == "angry"
    assert Counter(u.label for u in four.utterances) == {"angry": 4, "happy": 3, "neutral": 3, "sad": 3}
    assert [speakers(four, fold) for fold in folds(four)] == [({"10"}, {"08"}, {"03"}), ({"03"}, {"10"}, {"08"}), ({"08"}, {"03"}, {"10"})]
    everything = read_corpus("emodb", tmp_path, classes="all")
    assert everything.classes == ("angry", "boredom", "disgust", "fear", "happy", "neutral", "sad")
    assert labels(everything)["03a01Aa.wav"] == "fear" and len(everything.utterances) == 22


def test_ravdess(tmp_path):
    for copy in ("audio_speech_actors_01-24", "."):  # everything is there twice
        for actor, emotion in itertools.product(range(1, 25), range(1, 9)):
            touch(tmp_path / "RAVDESS" / copy / f"Actor_{actor:02}" / f"03-01-{emotion:02}-01-02-01-{actor:02}.wav")
    touch(tmp_path / "RAVDESS" / "Actor_01" / "03-02-05-01-01-01-01.wav")  # a song
    four = read_corpus("ravdess", tmp_path)
    assert Counter(u.label for u in four.utterances) == {"angry": 24, "happy": 24, "neutral": 24, "sad": 24}
    assert labels(four)["03-01-05-01-02-01-18.wav"] == "angry" and labels(four)["03-01-01-01-02-01-18.wav"] == "neutral"
    made = folds(four)
    assert len(made) == 6 and speakers(four, made[0])[1:] == ({"05", "06", "07", "08"}, {"01", "02", "03", "04"})
    assert speakers(four, made[5])[1:] == ({"01", "02", "03", "04"}, {"21", "22", "23", "24"})
    assert read_corpus("ravdess", tmp_path, classes="all").classes == (
        "angry", "calm", "disgust", "fear", "happy", "neutral", "sad", "surprise")  # fmt: skip


def test_crema_d(tmp_path):
    codes = dict(ANG="angry", DIS="disgust", FEA="fear", HAP="happy", NEU="neutral", SAD="sad")
    for actor, code in itertools.product(range(1001, 1092), codes):
        touch(tmp_path / "AudioWAV" / f"{actor}_DFA_{code}_XX.wav")
    touch(tmp_path / "AudioWAV" / "1040_ITH_SAD_X.wav")
    listing = read_corpus("crema-d", tmp_path, classes="all")
    assert labels(listing) == {p.name: codes[p.name[9:12]] for p in (tmp_path / "AudioWAV").iterdir()}
    tested = [speakers(listing, fold)[2] for fold in folds(listing)]
    assert [(min(s), max(s), len(s)) for s in tested] == [
        ("1001", "1018", 18), ("1019", "1036", 18), ("1037", "1054", 18), ("1055", "1072", 18), ("1073", "1091", 19)]  # fmt: skip


def iemocap(root):
    codes = ("ang", "hap", "exc", "neu", "sad", "fru", "xxx", "oth")
    for s in range(1, 6):
        session = root / f"Session{s}"
        for dialog in (f"Ses0{s}F_impro04", f"Ses0{s}M_script01_1b"):
            text = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]", ""]
            for (n, code), who in itertools.product(enumerate(codes), "FM"):
                turn = f"{dialog}_{who}{n:03}"
                touch(session / "sentences/wav" / dialog / f"{turn}.wav", session / "sentences/wav" / dialog / f"._{turn}.wav")
                text += [f"[6.2901 - 8.2357]\t{turn}\t{code}\t[2.5000, 2.5000, 2.5000]", "C-E2:\tNeutral;\t()", "A-E3:\tval 3; \xe9", ""]
            touch(session / "dialog/wav" / f"{dialog}.wav", session / "dialog/EmoEvaluation/Categorical" / f"{dialog}_e1_cat.txt")
            label_file = session / "dialog/EmoEvaluation" / f"{dialog}.txt"
            label_file.write_bytes("\r\n".join(text).encode("latin-1"))
            (label_file.parent / f"._{dialog}.txt").write_bytes(b"\x00\x05\x16\x07")
            touch(session / "dialog/transcriptions" / f"{dialog}.txt")  # the same name as the label file's


@pytest.mark.parametrize("depth", ["", "IEMOCAP_full_release", "IEMOCAP_full_release_withoutVideos/IEMOCAP_full_release"])
def test_iemocap(tmp_path, depth):
    iemocap(tmp_path / depth)
    standard = read_corpus("iemocap", tmp_path)
    assert Counter(u.label for u in standard.utterances) == {"angry": 20, "happy": 40, "neutral": 20, "sad": 20}
    speaker = {u.path.stem: u.speaker for u in standard.utterances}
    assert speaker["Ses01F_impro04_M000"] == "1M" and speaker["Ses05M_script01_1b_F003"] == "5F"  # the last letter, not the first
    assert [speakers(standard, fold)[1:] for fold in folds(standard)] == [
        ({f"{s % 5 + 1}F", f"{s % 5 + 1}M"}, {f"{s}F", f"{s}M"}) for s in range(1, 6)]  # fmt: skip
    assert "frustrated" in read_corpus("iemocap", tmp_path, classes="all").classes

    paper = read_corpus("iemocap", tmp_path, protocol="paper")
    assert Counter(u.label for u in paper.utterances) == dict.fromkeys(features.CLASSES, 10)  # exc and scripts dropped
    assert all("_impro" in u.path.name for u in paper.utterances)
    pairs = [{"1M", "2F"}, {"2M", "3F"}, {"3M", "4F"}, {"4M", "5F"}, {"5M", "1F"}]
    assert [speakers(paper, fold)[2] for fold in folds(paper)] == pairs
    assert [speakers(paper, fold)[1] for fold in folds(paper)] == pairs[1:] + pairs[:1]


def test_labels_without_recordings_are_counted(tmp_path, capsys):
    iemocap(tmp_path)
    (tmp_path / "Session3/sentences/wav/Ses03F_impro04/Ses03F_impro04_F000.wav").unlink()
    assert len(read_corpus("iemocap", tmp_path).utterances) == 99
    assert "1 of 160 labels have no recording" in capsys.readouterr().err
    with pytest.raises(InputError, match="1 of 160"):
        read_corpus("iemocap", tmp_path, strict=True)
    for path in tmp_path.rglob("*.wav"):
        path.unlink()
    with pytest.raises(InputError, match="160 labels, and not one of their recordings"):
        read_corpus("iemocap", tmp_path)


def msp_improv(root, label_file):
    text, wavs = [], 0
    for s, who, letter, condition in itertools.product(range(1, 7), "FM", "AHNS", "RST"):
        stem = f"IMPROV-S01{letter}-{who}{s:02}-{condition}-FM01"
        touch(root / f"session{s}/S01{letter}/{condition}/MSP-{stem}.wav", root / f"session{s}/S01{letter}/{condition}/MSP-{stem}.avi")
        rated = {"T": "X", "S": "O", "R": "N"}[condition] if letter == "S" else letter
        text += [
            f"UTD-{stem}.avi; {rated}; A:3.333333; V:NaN; D:3.000000 ; N:3.666667;",
            "WORKER00000001; Angry; Angry,Frustrated; A:3.000000; V:2.000000; D:3.000000; N:4.000000;",
            "",
        ]
        wavs += 1
    label_file.parent.mkdir(parents=True, exist_ok=True)
    label_file.write_bytes("\r\n".join(text).encode())
    return wavs


@pytest.mark.parametrize("name", ["Evalution.txt", "Evaluation.txt", "labels/evaluation.TXT", "Labels/Evalution.txt"])
def test_msp_improv(tmp_path, name):
    root = tmp_path / "a/MSP-IMPROV"
    wavs = msp_improv(root / "Audio", root / name)
    standard = read_corpus("msp-improv", tmp_path)
    assert Counter(u.label for u in standard.utterances) == {"angry": 36, "happy": 36, "neutral": 48}  # no sad: they were rated otherwise
    assert standard.classes == features.CLASSES and wavs == 144
    assert all(u.path.suffix == ".wav" and u.speaker == u.path.stem[16:19] for u in standard.utterances)
    assert [speakers(standard, fold)[2] for fold in folds(standard)] == [{f"F{s:02}", f"M{s:02}"} for s in range(1, 7)]

    paper = read_corpus("msp-improv", tmp_path, protocol="paper")
    assert Counter(u.label for u in paper.utterances) == dict.fromkeys(features.CLASSES, 12)  # the intended emotion
    assert all("-R-" in u.path.name for u in paper.utterances)
    sides = [speakers(paper, fold) for fold in folds(paper)]
    assert [(validation, test) for _, validation, test in sides] == [
        ({f"F{v:02}", f"M{v:02}"}, {f"F{t:02}", f"M{t:02}"}) for t, v in ((1, 2), (2, 3), (3, 4), (5, 6))]  # fmt: skip
    assert all(len(train) == 8 for train, _, _ in sides)


def msp_podcast(root, label_file, validation="Development", each=3):
    text = ["FileName,EmoClass,EmoAct,EmoVal,EmoDom,SpkrID,Gender,Split_Set"]
    speakers_of = {"Train": (1, 2, "Unknown"), validation: (3,), "Test1": (4, 7, "Unknown"), "Test2": (4, 5, 6)}
    for k, (split, speaker) in enumerate((split, speaker) for split, them in speakers_of.items() for speaker in them):
        for code, n in itertools.product("AHNSUFDCOX", range(each)):
            name = f"MSP-PODCAST_{k:04}_{ord(code):02}{n:03}.wav"
            touch(root / f"part{k % 2}" / name)
            text.append(f"{name},{code},2.2,4.0,2.6,{speaker},Male,{split}")
    touch(root / "MSP-PODCAST_test3_0001.wav", root / "._MSP-PODCAST_0000_6500.wav")  # no row
    text.append("MSP-PODCAST_test3_0002.wav,N,2.2,4.0,2.6,9,Male,Test3")
    label_file.parent.mkdir(parents=True, exist_ok=True)
    label_file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(text).encode())


@pytest.mark.parametrize(
    "name, audio, validation",
    [("Labels/labels_consensus.csv", "Audios", "Development"), ("Labels/Labels_Concensus.csv", "Audio", "Validation"),
     ("labels_concensus.csv", "Audios", "Validation"), ("labels_consensus.csv", "Audio", "Development")],
)  # fmt: skip
def test_msp_podcast(tmp_path, name, audio, validation):
    root = tmp_path / "MSP-PODCAST-Publish-1.11"
    msp_podcast(root / audio, root / name, validation)
    standard = read_corpus("msp-podcast", tmp_path)
    assert Counter(u.label for u in standard.utterances) == dict.fromkeys(features.CLASSES, 30)
    test1, test2 = folds(standard)
    assert (test1.train, test1.validation) == (test2.train, test2.validation)
    assert speakers(standard, test1) == ({"1", "2", "Unknown"}, {"3"}, {"4", "7", "Unknown"})
    assert speakers(standard, test2)[2] == {"4", "5", "6"}
    store = SimpleNamespace(seconds=np.ones(120), features=np.ones(120), bad={})
    said = "\n".join(features.describe(standard, folds(standard), store))
    assert "speakers  7: 1, 2, 3, 4, 5, 6, 7\n" in said and "unknown   24 utterances" in said
    assert len(read_corpus("msp-podcast", tmp_path, classes="all").classes) == 8

    paper = read_corpus("msp-podcast", tmp_path, protocol="paper")
    assert {u.speaker for u in paper.utterances} == {"1", "2", "4", "5", "6", "7"}  # neither Unknown nor Development


def test_msp_podcast_paper_is_five_equal_groups_and_never_too_large(tmp_path, monkeypatch):
    text = ["FileName,EmoClass,EmoAct,EmoVal,EmoDom,SpkrID,Gender,Split_Set"]
    for n in range(600):
        touch(tmp_path / "Audios" / f"MSP-PODCAST_{n:04}.wav")
        text.append(f"MSP-PODCAST_{n:04}.wav,{'AHNS'[n % 4]},1,1,1,{n % 40},Male,{('Train', 'Test1', 'Test2')[n % 40 % 3]}")
    (tmp_path / "labels_consensus.csv").write_text("\n".join(text))
    monkeypatch.setattr(features.random, "random", None)  # nothing global is drawn from
    listing = read_corpus("msp-podcast", tmp_path, protocol="paper")
    made = folds(listing)
    assert [len(fold.test) for fold in made] == [120] * 5 and [len(fold.train) for fold in made] == [360] * 5
    smaller = replace(CORPORA["msp-podcast"], paper=features.Protocol(features.paper_msp_podcast, at_most=100))
    monkeypatch.setitem(CORPORA, "msp-podcast", smaller)
    thinned = folds(listing)
    assert thinned == folds(listing)
    for whole, thin in zip(made, thinned):
        assert [len(side) for side in (thin.train, thin.validation, thin.test)] == [100] * 3
        assert set(thin.train) < set(whole.train) and set(thin.test) < set(whole.test)


def test_a_seventh_corpus_is_a_function_and_a_row(tmp_path, monkeypatch):
    def index(root):
        for path in features.below(root, r"\w_\w\.wav"):
            yield features.Utterance(path, path.stem[2], path.stem[0], group=path.stem[0])

    touch(*(tmp_path / f"{speaker}_{code}.wav" for speaker in "PQR" for code in "hsx"))
    monkeypatch.setitem(CORPORA, "seventh", features.Corpus(index, "free", "files named like P_h.wav", {"h": "happy", "s": "sad"}))
    listing = read_corpus("seventh", tmp_path)
    assert len(listing.utterances) == 6 and len(folds(listing)) == 3


# ---------------------------------------------------------------------------------------------------------------------
# One's own corpus


def own(tmp_path, header, *rows):
    for row in rows:
        tone(tmp_path / "sounds" / row.split(",")[0].removeprefix("sounds/")) if ".wav" in row else None
    path = tmp_path / "mine.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_csv_leaves_one_speaker_out(tmp_path):
    rows = [f"sounds/{s}{label}.wav,{label},{s}" for s in "abc" for label in ("zen", "awe")]
    listing = read_corpus("csv", own(tmp_path, "path,label,speaker", *rows))
    assert listing.classes == ("awe", "zen") and listing.root == tmp_path
    assert [speakers(listing, fold) for fold in folds(listing)] == [({"c"}, {"b"}, {"a"}), ({"a"}, {"c"}, {"b"}), ({"b"}, {"a"}, {"c"})]


def test_csv_of_many_speakers_has_five_folds(tmp_path):
    rows = [f"sounds/{s}_{n}.wav,{'xy'[n % 2]},{s}" for s in range(12) for n in range(s + 1)]
    listing = read_corpus("csv", own(tmp_path, "path,label,speaker", *rows))
    sizes = [len(fold.test) for fold in folds(listing)]
    assert len(sizes) == 5 and sum(sizes) == 78 and max(sizes) - min(sizes) <= 4


def test_csv_with_an_official_split(tmp_path):
    rows = [f"sounds/{s}{label}.wav,{label},{s},{split}" for s, split in zip("abc", ("train", "validation", "test")) for label in "xy"]
    listing = read_corpus("csv", own(tmp_path, "path,label,speaker,split", *rows))
    assert [speakers(listing, fold) for fold in folds(listing)] == [({"a"}, {"b"}, {"c"})]
    listing = read_corpus("csv", own(tmp_path, "path,label,speaker,split", *rows, "sounds/d.wav,x,a,test"))
    with pytest.raises(InputError, match="speaker a is in train and in test"):
        folds(listing)
    listing = read_corpus("csv", own(tmp_path, "path,label,speaker,split", *rows[:4]))
    with pytest.raises(InputError, match="found 2 part.*: train, validation; a fold needs three"):
        folds(listing)


@pytest.mark.parametrize(
    "text, said",
    [
        ("path,label\na.wav,x\n", "no column speaker"),
        ("", "no column path, label, speaker; found nothing"),
        ("path,label,speaker\ngone.wav,x,1\n", "names 1 files that are not there: gone.wav"),
        ("path,label,speaker\ngone.wav,,1\n", "gone.wav has no label"),
        ("path,label,speaker,split\na.wav,x,1,dev\n", "unknown split 'dev' of a.wav; known: train, validation, test"),
        ("path,label,speaker\n", "has a header and no row"),
    ],
)
def test_csv_errors(tmp_path, text, said):
    (tmp_path / "mine.csv").write_text(text)
    with pytest.raises(InputError) as error:
        read_corpus("csv", tmp_path / "mine.csv")
    assert said in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Counts and messages


def test_counts_are_compared(tmp_path, capsys):
    tree = [f"{n // 20 + 3:02}a{n % 20:02}{letter}a.wav" for letter, many in zip("WFNT", (127, 71, 79, 62)) for n in range(many)]
    touch(*(tmp_path / "wav" / name for name in tree))
    read_corpus("emodb", tmp_path, strict=True)  # the four-class part
    assert capsys.readouterr().err == ""
    (tmp_path / "wav" / tree[0]).unlink()
    assert len(read_corpus("emodb", tmp_path).utterances) == 338
    said = capsys.readouterr().err
    assert "found 126 angry" in said and "expected 127 angry" in said
    with pytest.raises(InputError, match="found 126 angry.*expected 127 angry"):
        read_corpus("emodb", tmp_path, strict=True)


def test_each_known_version_of_msp_podcast_fits(tmp_path, monkeypatch):
    msp_podcast(tmp_path / "Audios", tmp_path / "labels_consensus.csv")
    splits = {"train": 90, "validation": 30, "test1": 90, "test2": 90}
    versions = {"four": {k: n * 4 // 10 for k, n in splits.items()}, "any": {f"{k} of any label": n for k, n in splits.items()}}
    for version, numbers in versions.items():
        expected = {"other": {"train": 1}, version: numbers}
        monkeypatch.setitem(CORPORA, "msp-podcast", replace(CORPORA["msp-podcast"], expected=expected))
        read_corpus("msp-podcast", tmp_path, strict=True)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--dataset", "iemocop"], "'iemocop'; known: smoke, emodb, ravdess, crema-d, iemocap, msp-improv, msp-podcast, csv"),
        (["--dataset", "iemocap"], "it holds strange.txt); looked for folders Session1 to Session5"),
        (["--dataset", "emodb", "--root", "nowhere"], "no such folder"),
        (["--dataset", "ravdess", "--protocol", "paper"], "these have: iemocap, msp-improv, msp-podcast"),
        (["--dataset", "emodb", "--protocol", "papers"], "known: standard, paper"),
        (["--dataset", "emodb", "--classes", "five"], "known: four, all"),
        (["--dataset", "csv"], "no file"),
        (["--workers", "0"], "expected at least 1"),
    ],
)
def test_input_errors_are_one_line(tmp_path, capsys, arguments, said):
    touch(tmp_path / "strange.txt")
    assert features.main(["--root", str(tmp_path), *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err and err.startswith("error: ") and err.count("\n") == 1


def test_index_as_json(tmp_path, capsys):
    for s, letter in itertools.product((3, 8, 9), "WT"):
        tone(tmp_path / "wav" / f"{s:02}a01{letter}a.wav")
    arguments = {"--dataset": "emodb", "--root": tmp_path, "--cache": tmp_path / "c", "--json": tmp_path / "i.json"}
    assert features.main([str(part) for pair in arguments.items() for part in pair]) == 0
    index = json.loads((tmp_path / "i.json").read_text())
    assert index["dataset"] == "emodb" and len(index["utterances"]) == 6
    assert {"path": "wav/08a01Ta.wav", "label": "sad", "speaker": "08", "fold": 1}.items() <= index["utterances"][2].items()
    assert "corpus    found 3 angry" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Audio


def riff(kind, channels, rate, bits, data, extensible=False, extra=False):
    block = channels * bits // 8
    form = struct.pack("<HHIIHH", 0xFFFE if extensible else kind, channels, rate, rate * block, block, bits)
    if extensible:
        form += struct.pack("<HHIH", 22, bits, 0, kind) + b"\x00\x00\x00\x00\x10\x00\x80\x00\x00\xaa\x00\x38\x9b\x71"
    chunks = [(b"fmt ", form), (b"data", data)]
    if extra:
        chunks = [(b"JUNK", b"\0" * 28), chunks[0], (b"LIST", b"INFOabc\0"), chunks[1], (b"LIST", b"INFO")]
    body = b"".join(name + struct.pack("<I", len(part)) + part + b"\0" * (len(part) % 2) for name, part in chunks)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body


def encode(x, kind, bits):
    if kind == 3:
        return x.astype(f"<f{bits // 8}").tobytes()
    if bits == 8:
        return np.round(x * 128 + 128).astype(np.uint8).tobytes()
    whole = np.round(x * 2.0 ** (bits - 1)).astype("<i8")
    return whole.view(np.uint8).reshape(-1, 8)[:, : bits // 8].tobytes()  # little-endian: the lower bytes


@pytest.mark.parametrize("kind, bits", [(1, 8), (1, 16), (1, 24), (1, 32), (3, 32), (3, 64)])
@pytest.mark.parametrize("extensible, extra", [(False, False), (True, False), (False, True)])
def test_every_sample_format_is_read(tmp_path, kind, bits, extensible, extra):
    x = 0.5 * np.sin(np.arange(1601) / 20)
    (tmp_path / "a.wav").write_bytes(riff(kind, 1, 16000, bits, encode(x, kind, bits), extensible, extra))
    samples = features.read_wav(tmp_path / "a.wav")
    assert samples.dtype == np.float32 and np.abs(samples - x).max() <= max(2.0**-bits, 1e-7)


@pytest.mark.parametrize("channels", [2, 5])
@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_channels_and_rates(tmp_path, channels, rate):
    t = np.arange(rate) / rate
    x = np.stack([k * 0.1 * np.sin(2 * np.pi * 500 * t) for k in range(channels)], axis=1)
    (tmp_path / "a.wav").write_bytes(riff(1, channels, rate, 24, encode(x.ravel(), 1, 24)))
    samples = features.read_wav(tmp_path / "a.wav")
    expected = 0.1 * (channels - 1) / 2 * np.sin(2 * np.pi * 500 * np.arange(16000) / 16000)
    assert len(samples) == 16000 and np.abs(samples - expected)[200:-200].max() < 2e-3


@pytest.mark.parametrize("seconds", [0.5, 8.0, 19.3])
def test_features_are_torchaudios(seconds):
    rng = np.random.default_rng(0)
    samples = (rng.standard_normal(int(16000 * seconds)) * 0.1).astype(np.float32)
    samples[: len(samples) // 2] *= 1e-6  # the clamp at 80 dB counts
    transform = torchaudio.transforms.MFCC(16000, 128, log_mels=False, melkwargs=dict(n_fft=1024, hop_length=250, n_mels=128))
    for window in features.windows(samples, Settings()):
        oracle = transform(torch.from_numpy(window))[:, :512].reshape(128, 128, 4).amax(dim=2)
        ours = features.mfcc(Settings())(torch.from_numpy(window))
        assert ours.shape == (128, 128) and (ours - oracle).abs().max() < 1e-3


def emodb(root, **sounds):
    """An EMO-DB of twelve files, with `sounds` (name: bytes) among them."""
    for s, letter in itertools.product((3, 8, 9), "WFNT"):
        tone(root / "wav" / f"{s:02}a01{letter}a.wav", frequency=100 * s)
    for name, data in sounds.items():
        (root / "wav" / f"{name}.wav").write_bytes(data)
    return read_corpus("emodb", root)


def test_silence_and_less_than_a_frame(tmp_path):
    x = np.zeros(1600)
    zero, one = riff(1, 1, 16000, 16, encode(x, 1, 16)), riff(1, 1, 44100, 16, b"\x01\x00")
    sounds = {"03a02Wa": zero, "03a02Fa": one}
    for padding in ("repeat", "zero"):
        store = load(emodb(tmp_path, **sounds), Settings(padding=padding), tmp_path / "cache")
        assert store.features.dtype == np.float16 and np.isfinite(store.features).all() and not store.bad


def test_all_bad_files_are_named_at_once(tmp_path):
    good = riff(1, 1, 16000, 16, encode(np.zeros(1600), 1, 16))
    sounds = {
        "03a02Wa": b"",
        "03a02Fa": b"RIFF",
        "03a02Na": good[:1000],
        "03a02Ta": riff(1, 1, 16000, 16, b""),
        "08a02Wa": riff(3, 1, 16000, 32, np.array([0, np.nan], "<f4").tobytes()),
        "08a02Fa": riff(3, 1, 16000, 32, np.array([0, np.inf], "<f4").tobytes()),
        "08a02Na": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n",
        "08a02Ta": b"some text that is no sound",
        "09a02Wa": riff(1, 0, 16000, 16, b"\0\0"),
        "09a02Fa": riff(1, 1, 0, 16, b"\0\0"),
        "09a02Na": good[:20],
    }
    (tmp_path / "wav").mkdir()
    (tmp_path / "wav/09a02Ta.wav").symlink_to("nowhere")
    listing = emodb(tmp_path, **sounds)
    with pytest.raises(InputError) as error:
        load(listing, cache=tmp_path / "cache")
    lines = str(error.value).split("\n")
    assert lines[0].startswith("12 of 24 recordings") and "--skip-bad" in lines[0]
    said = {re.search(r"\d\da\d\d[A-Z]a", line)[0]: line for line in lines[1:]}
    assert "git-lfs" in said["08a02Na"] and "truncated" in said["03a02Na"] and said.keys() == {*sounds, "09a02Ta"}

    store = load(listing, cache=tmp_path / "cache", skip_bad=True)
    assert sorted(listing.utterances[i].path.stem for i in store.bad) == sorted([*sounds, "09a02Ta"])
    made = folds(listing, store.bad)
    assert sum(len(fold.test) for fold in made) == 12 and not {i for fold in made for i in fold.train} & set(store.bad)
    window, of = store.windows_of(made[0].train)
    assert len(window) == len(made[0].train) and len(store.features) == 12
    with pytest.raises(InputError, match="12 of 24"):  # also when the store is there
        load(listing, cache=tmp_path / "cache")


# ---------------------------------------------------------------------------------------------------------------------
# The store


def corpus_of(root, files):
    for n in range(files):
        tone(root / "wav" / f"{n % 3 + 3:02}a{n // 4:02}{'WFNT'[n % 4]}a.wav", 0.1 if n % 40 else 17, frequency=100 + n)
    return read_corpus("emodb", root)


def content(cache):
    (folder,) = Path(cache).iterdir()
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_that_stopped_goes_on(tmp_path, monkeypatch):
    listing = corpus_of(tmp_path, 100)
    store = load(listing, cache=tmp_path / "whole")
    assert len(store.features) == 100 + 3 * 2 and store.seconds.max() == 17 and isinstance(store.features, np.memmap)

    class Stop(Exception):
        pass

    def stop(text):
        if text.startswith("features 64"):
            raise Stop

    with pytest.raises(Stop):
        load(listing, cache=tmp_path / "stopped", progress=stop)
    (part,) = (tmp_path / "stopped").iterdir()
    for name, more in (("features.npy", b"half a chunk"), ("journal", b"[[1, 0.1, nu")):  # killed while it wrote
        with open(part / name, "ab") as file:
            file.write(more)
    said = []
    load(listing, cache=tmp_path / "stopped", progress=said.append)
    assert said[0].startswith("features 96/100") and content(tmp_path / "stopped") == content(tmp_path / "whole")
    monkeypatch.setattr(features, "read_wav", None)  # a store that is there is not computed again
    assert (load(listing, cache=tmp_path / "whole").features == store.features).all()


def test_workers_that_were_killed_and_started_again_write_the_same_bytes(tmp_path):
    listing = corpus_of(tmp_path, 130)
    load(listing, cache=tmp_path / "whole")
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(Path(features.__file__).parent)!r})\n"
        "import features\n"
        "if __name__ == '__main__':\n"
        "    features.POOLED = 0\n"
        "    die = lambda text: text.startswith('features 64') and os.kill(os.getpid(), signal.SIGKILL)\n"
        f"    listing = features.read_corpus('emodb', {str(tmp_path)!r})\n"
        f"    features.load(listing, cache={str(tmp_path / 'killed')!r}, workers=2, progress=die)\n"
    )
    killed = subprocess.run([sys.executable, script], env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    assert killed.returncode == -signal.SIGKILL and [path.suffix for path in (tmp_path / "killed").iterdir()] == [".part"]
    said = []
    load(listing, cache=tmp_path / "killed", progress=said.append)
    assert said[0].startswith("features 96/130") and content(tmp_path / "killed") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    "name, data", [("store.json", b"[]"), ("store.json", b"{"), ("features.npy", b""), ("features.npy", b"\x93NUMPY garbage")]
)
def test_a_store_that_is_not_one_is_refused(tmp_path, name, data):
    listing = emodb(tmp_path)
    load(listing, cache=tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    (folder / name).write_bytes(data)
    with pytest.raises(InputError, match="does not hold the features of 12 utterances; delete it"):
        load(listing, cache=tmp_path / "cache")


def test_a_store_of_pickles_is_refused(tmp_path):
    listing = emodb(tmp_path)
    load(listing, cache=tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    np.save(folder / "features.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="delete it"):
        load(listing, cache=tmp_path / "cache")
