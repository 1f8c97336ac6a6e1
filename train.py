"""Search, derive, train, test: emoDARTS end to end, speaker-independent.

    python train.py                                      # the smoke test, without data: 2 minutes
    python train.py --dataset emodb --root /data/emodb   # EMO-DB, leave one speaker out
    python train.py --dry-run                            # what would happen, and what it would cost

The way of the data:

    wav files -> features.py: utterances, folds (who trains, validates, tests), batches of maps
    -> search: supernet -> Genotype -> train: its network -> predict: logits -> a fold's result.json
    -> tables and report.md: functions of the result.json files alone

In each fold the search sees the training speakers only, half of their utterances for the weights,
half for the alphas; the derived network is trained from scratch on all of them; test speakers are
scored at the end, and choose nothing. What a fold leaves lies in

    runs/DATASET-SCALE-KEY/MODEL-seedS/foldK    KEY: of data, code, settings but model and seed
"""

import argparse
import csv
import ctypes
import hashlib
import inspect
import io
import itertools
import json
import linecache
import math
import os
import re
import sys
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
from scipy import stats
from torch import nn

import emodarts
import features
from emodarts import CNN_OPS, RELAXATIONS, SEQ_OPS, SEQ_SPACES, Architect, Genotype, Network, derive
from emodarts import entropy, expected_parameters, held_fixed, random_genotype, without_statistics
from features import CORPORA, Data, InputError, Settings, code_digest, halves, listed, lock, naming
from features import poisoned, read_corpus, seed_of, shuffled_parts, warn, with_frames, write

# Optimizer and schedule --------------------------------------------------------------------------
LABEL_SMOOTHING = 0.1
CLIP = 5.0  # largest norm of the weights' gradient, DARTS'
SEARCH_LR_END = 0.001  # DARTS', too; not 0: while alphas move, so must the weights
RECIPES = {  # see `recipe`; lr and drop_path change with the epoch, see the loops
    "authors": dict(optimizer="sgd", lr=0.025, rise=0.0, decay=3e-4, dropout=0.3, drop_path=0.2),
    "paper": dict(optimizer="adamw", lr=0.001, rise=0.1, decay=0.05, dropout=0.0, drop_path=0.0),
    "small": dict(optimizer="adamw", lr=0.003, rise=0.0, decay=0.05, dropout=0.0, drop_path=0.0),
    "baseline": dict(optimizer="adamw", lr=0.001, rise=0.0, decay=0.05, drop_path=0.0),
}

def recipe(options):
    """Optimizer, learning rate and regularisation of a model."""
    name = "authors" if options.recipe == "authors" else options.scale
    chosen = RECIPES["baseline" if options.model in BASELINES else name]
    return chosen if options.lr is None else chosen | {"lr": options.lr}

def optimizer_of(weights, options):
    how = recipe(options)
    if how["optimizer"] == "sgd":
        return torch.optim.SGD(weights, how["lr"], momentum=0.9, weight_decay=how["decay"])
    return torch.optim.AdamW(weights, how["lr"], weight_decay=how["decay"], fused=True)  # faster

def learning_rate(epoch, epochs, last, options):
    """Cosine from the recipe's rate to `last`, under a rise over the first of the epochs."""
    first = recipe(options)["lr"]
    last = min(last, first)
    cosine = (1 + math.cos(math.pi * epoch / epochs)) / 2
    rise = recipe(options)["rise"] * epochs
    return (last + (first - last) * cosine) * min(1, (epoch + 0.5) / max(rise, 0.5))

def forward(net, x, options):
    """Maps -> logits, float32; with --amp in bfloat16 inside, where torch holds it for safe."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=options.amp):
        return net(x).float()

def alpha_step(architect, alpha_batch, weight_batch, lr, options):
    amp = options.amp and options.order == 1  # bfloat16 would round order 2's differences away
    with torch.autocast(alpha_batch[0].device.type, torch.bfloat16, enabled=amp):
        return architect.step(alpha_batch, weight_batch, lr)

def weight_step(loss, optimizer):
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], CLIP)
    if not math.isfinite(norm):
        raise ValueError("the gradient of the weights is not finite")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)  # the alphas' step has no use for it
    return loss.item()

# The two loops -----------------------------------------------------------------------------------
def search(net, data, members, options, checkpoint):
    """Moves the alphas and the weights of a supernet in turn, on two halves of the training
    utterances `members` [bi-level problem, see emodarts.py]. -> Genotype"""
    here = options.seed, checkpoint.fold, "search"
    for_weights, for_alphas = halves(members, data.labels, options.seed, checkpoint.fold)
    weight = data.class_weights(members)  # rare classes count as much as others
    loss = partial(F.cross_entropy, weight=weight, label_smoothing=LABEL_SMOOTHING)

    def loss_of_alphas(logits, target):
        value = loss(logits, target)
        if options.size_penalty:
            value = value + options.size_penalty * expected_parameters(net) / 1e6
        return value
    architect = Architect(net, loss_of_alphas, order=options.order, lr=options.alpha_lr)
    optimizer = optimizer_of(net.weights(), options)
    checkpoint.restore(net=net, optimizer=optimizer, alphas=architect.optimizer)
    for epoch in range(checkpoint.epoch, options.search_epochs):
        lr = learning_rate(epoch, options.search_epochs, SEARCH_LR_END, options)
        optimizer.param_groups[0]["lr"] = lr
        weight_batches = data.batches(for_weights, options.batch, *here, epoch, "weights")
        alpha_batches = data.batches(for_alphas, options.batch, *here, epoch, "alphas")
        losses, alpha_losses = [], []
        net.train()
        # Epochs end with the shorter half; the longer one leaves out other windows in each epoch.
        for step, (weight_batch, alpha_batch) in enumerate(zip(weight_batches, alpha_batches)):
            checkpoint.step = step  # an error names it
            torch.manual_seed(seed_of(*here, epoch, step))
            window, target = weight_batch
            x = augmented(data.maps(window), options)
            # In the warm-up alphas wait: skips and pools would be ahead of untrained convolutions.
            if epoch >= options.warm_up:
                window, held_out = alpha_batch
                batches = (data.maps(window), held_out), (x, target)
                alpha_losses.append(alpha_step(architect, *batches, lr, options))
            with held_fixed(net.alphas()):
                logits = forward(net, x, options)
                losses.append(weight_step(loss(logits, target), optimizer))
        row = {"lr": lr, "entropy": entropy(net), "loss": np.mean(losses)}
        if alpha_losses:
            row["alpha_loss"] = np.mean(alpha_losses)
        checkpoint.epoch_done(row)
    return derive(net)

def train(net, data, members, watched, options, checkpoint):
    """Trains a network from scratch. The last epoch counts. `watched`: name in the log ->
    utterances that are scored after each epoch, for the log alone."""
    here = options.seed, checkpoint.fold, "train"
    weight = data.class_weights(members)  # rare classes count as much as others
    loss = partial(F.cross_entropy, weight=weight, label_smoothing=LABEL_SMOOTHING)
    optimizer = optimizer_of(net.parameters(), options)
    checkpoint.restore(net=net, optimizer=optimizer)
    for epoch in range(checkpoint.epoch, options.epochs):
        lr = learning_rate(epoch, options.epochs, 0.0, options)
        optimizer.param_groups[0]["lr"] = lr
        net.drop_path = recipe(options)["drop_path"] * epoch / options.epochs
        losses = []
        net.train()
        batches = data.batches(members, options.batch, *here, epoch)
        for step, (window, target) in enumerate(batches):
            checkpoint.step = step  # an error names it
            torch.manual_seed(seed_of(*here, epoch, step))
            x = augmented(data.maps(window), options)
            logits = forward(net, x, options)
            losses.append(weight_step(loss(logits, target), optimizer))
        row = {"lr": lr, "loss": np.mean(losses)}
        net.eval()
        for name, seen in watched.items():
            confusion = confusion_matrix(data.labels[seen], predict(net, data, seen, options))
            for metric, function in METRICS.items():
                row[f"{name}_{metric.lower()}"] = function(confusion)
        checkpoint.epoch_done(row)
    checkpoint.save()

def augmented(x, options):
    """Maps (N, 1, F, T), each shifted in time, around the end; then a stretch of time and, of
    log-mel, of bands, at most a fifth of the axis, is set to 0, the mean."""
    count, _, _, length = x.shape
    t = (torch.arange(length) + torch.randint(length, (count, 1))) % length  # (N, T)
    x = x.gather(3, t.to(x.device)[:, None, None].expand_as(x))
    x = torchaudio.functional.mask_along_axis_iid(x, length // 5, 0.0, axis=3)
    if options.features.startswith("log-mel"):  # on that axis MFCCs have no bands to be masked
        x = torchaudio.functional.mask_along_axis_iid(x, x.shape[2] // 5, 0.0, axis=2)
    return x

# Predictions and scores --------------------------------------------------------------------------
@torch.no_grad()
def predict(net, data, utterances, options, shuffled_by=()):
    """Logits of whole utterances, (utterances, classes): the mean over their windows. With
    `shuffled_by`, what `seed_of` takes, windows come in random batches."""
    window, of = data.windows(utterances)
    parts = torch.arange(len(window)).split(64)
    if shuffled_by:
        parts = shuffled_parts(len(window), 64, *shuffled_by)
    logits = torch.zeros(len(window), len(data.classes), dtype=torch.double)
    for part in parts:
        logits[part] = forward(net, data.maps(window[part]), options).cpu().double()
    total = torch.zeros(len(utterances), logits.shape[1], dtype=torch.double)
    return total.index_add_(0, of, logits) / torch.bincount(of)[:, None]

def confusion_matrix(labels, logits):
    """(classes, classes), rows the true classes, columns the predicted ones."""
    matrix = np.zeros((logits.shape[1], logits.shape[1]), dtype=int)
    np.add.at(matrix, (labels, logits.argmax(1).numpy()), 1)
    return matrix

def ua(confusion):
    """unweighted accuracy, the mean of the recalls of the classes that are present"""
    count = confusion.sum(axis=1)
    present = count > 0
    return float((confusion.diagonal()[present] / count[present]).mean())

def wa(confusion):
    """weighted accuracy, correct / all"""
    return float(confusion.trace() / confusion.sum())

# Functions of a confusion matrix: each is a column of the tables and of log.csv, a curve and, with
# its docstring, a line of the legend.
METRICS = {"UA": ua, "WA": wa}

def score(net, data, members, options, folder, file):
    """Scores test utterances, once. Leaves in `file` a row for each: what it was, what it was taken
    for, and probabilities. -> what result.json says of them"""
    logits = predict(net.eval(), data, members, options)
    if not logits.isfinite().all():  # the last step was too long, of which no gradient tells
        raise InputError(f"{folder}: its outputs are not finite; a smaller --lr may help")
    out = io.StringIO(newline="")
    rows = csv.writer(out)
    rows.writerow(["utterance", "label", "predicted", *data.classes])
    for i, p in zip(members, logits.softmax(1).tolist()):
        utterance = data.listing.utterances[i]
        probabilities = [f"{value:.9g}" for value in p]
        predicted = data.classes[np.argmax(p)]
        rows.writerow([data.listing.name(utterance), utterance.label, predicted, *probabilities])
    write(folder / file, out.getvalue())
    confusion = confusion_matrix(data.labels[members], logits)
    said = {"speakers": data.speakers(members), "predictions": file}
    for name, metric in METRICS.items():
        said[name] = metric(confusion)
    return said | {"confusion": confusion.tolist()}

# A fold from start to end ------------------------------------------------------------------------
def run_fold(options, k, data, split):
    """Search, derive, train, score; leaves genotype.json, log.csv, model.pt, predictions.csv, and
    result.json at last. `split`: features.Fold, who trains, validates and tests."""
    folder = folder_of(options, k)
    data.standardise_by(split.train)
    checkpoint = Checkpoint(options, k)
    try:
        if checkpoint.stage == "search":
            checkpoint.search_done(*find(data, split, options, checkpoint))
        genotype = None  # of a baseline
        if checkpoint.genotype:
            genotype = Genotype(**checkpoint.genotype)
            write(folder / "genotype.json", genotype.to_json())
        torch.manual_seed(seed_of(options.seed, k, "network"))
        net = network(options, len(data.classes), genotype).to(data.device)
        watched = {"val": split.validation} if split.validation else {}
        if options.protocol == "paper":  # for the log alone: the authors report its best epoch
            watched["test"] = sorted(set(itertools.chain(*split.tests.values())))
        train(net, data, split.train, watched, options, checkpoint)
    except ValueError as error:
        if "finite" not in str(error):
            raise
        raise InputError(f"{checkpoint.where()}: {error}; a smaller --lr may help") from None
    # Everything is chosen: the test speakers are scored.
    tests = {}
    for name, members in split.tests.items():
        file = "predictions.csv" if name == "test" else f"predictions-{name}.csv"
        tests[name] = score(net, data, members, options, folder, file)
    about = about_fold(options, data, split, checkpoint)
    about |= {"tests": tests, "parameters": sum(p.numel() for p in net.parameters())}
    save_model(folder / "model.pt", net, data, about)
    about["device"] = f"{data.device}, {torch.get_num_threads()} threads"
    about["log"] = checkpoint.rows
    about["seconds"] = {"search": 0.0, "train": 0.0}
    for row in checkpoint.rows:
        about["seconds"][row["stage"]] += row["seconds"]
    write(folder / "result.json", json.dumps(about, indent=1))
    for file in folder.glob("checkpoint.pt*"):  # also what a kill has left half written
        file.unlink()

def find(data, split, options, checkpoint):
    """-> the Genotype that is given or found, None of a baseline; what `decision` says of it"""
    if not searches(options):
        return given_genotype(options), None
    torch.manual_seed(seed_of(options.seed, checkpoint.fold, "supernet"))
    net = network(options, len(data.classes)).to(data.device)
    genotype = search(net, data, split.train, options, checkpoint)
    say(f"{checkpoint.title} found\n{genotype}")
    seen = split.validation or split.train
    return genotype, decision(net, genotype, data, seen, options, checkpoint.fold)

def decision(net, genotype, data, members, options, fold):
    """Has the search decided? Entropy of the alphas, and the discretisation gap: UA on `members` of
    the supernet's weights with all operations, and with only the genotype's."""
    alone = network(options, len(data.classes), genotype).to(data.device)
    alone.load_state_dict(net.state_dict(), strict=False)  # scales of its norms, new, stay 1
    said = {"entropy": entropy(net)}
    for name, each in (("ua_all_operations", net), ("ua_of_genotype", alone)):
        each.eval()
        for module in each.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train()  # by the batch: running statistics are those of all operations
        with without_statistics(each):
            logits = predict(each, data, members, options, (options.seed, fold, "decision"))
        said[name] = ua(confusion_matrix(data.labels[members], logits))
    return said

def about_fold(options, data, split, checkpoint):
    """What is known of a fold before it is scored, for model.pt and result.json."""
    prints = data.listing.prints
    return {
        "model": model_name(options),
        "seed": options.seed,
        "fold": checkpoint.fold,
        "classes": list(data.classes),
        "validation": data.speakers(split.validation),
        "validation_ua": checkpoint.rows[-1].get("val_ua"),
        "genotype": checkpoint.genotype,
        "decision": checkpoint.decision,
        "notes": notes_of(options, data.classes, data.bad),
        "skipped": list(data.bad.values()),
        "seen": sorted(prints[i] for i in split.train + split.validation),  # see score_corpus
        "settings": settings_of(options),
        "versions": f"python {sys.version.split()[0]}, torch {torch.__version__}",
    }

def save_model(file, net, data, about):
    """Writes model.pt. `about` as a text: the bytes of a pickle depend on which objects are the
    same, and so on what came out of a checkpoint."""
    weights = {name: tensor.cpu().contiguous() for name, tensor in net.state_dict().items()}
    mean_std = None  # where each speaker has one's own
    if data.normalise == "train":  # the same for all windows, (F,) each
        mean_std = [data.mean[0].clone(), data.std[0].clone()]
    model = {"about": json.dumps(about), "mean_std": mean_std, "weights": weights}
    write(file, partial(torch.save, model))

# Networks ----------------------------------------------------------------------------------------
def network(options, classes, genotype=None):
    """The supernet or, with a genotype, the derived network; or a baseline."""
    bands, _ = map_settings(options).shape
    if options.model in BASELINES:
        net = BASELINES[options.model](classes, bands)
    else:
        net = Network(
            classes=classes,
            bands=bands,
            channels=options.channels,
            cnn_cells=options.cnn_cells,
            seq_cells=options.seq_cells,
            nodes=options.nodes,
            stem_stride=options.stem_stride,
            seq_width=options.seq_width,
            seq_space=options.seq_space,
            relaxation=options.relaxation,
            dropout=recipe(options)["dropout"],
            fixed=fixed_cells(options),
            genotype=genotype,
        )
    return net.to(memory_format=torch.channels_last)  # faster at these sizes

def searches(options):
    return options.model == "emodarts" and options.genotype is None

def fixed_cells(options):
    """What --search cnn or seq leaves as it is: each node reads the two states before it."""
    def chain(first, second):
        return [[(first, i), (second, i + 1)] for i in range(options.nodes)]
    cells = {}
    if options.search == "cnn" and options.seq_cells:
        _, _, recurrent, *_ = SEQ_SPACES[options.seq_space]  # lstm_1 of all
        cells["seq"] = chain(recurrent, "skip_connect")
    if options.search == "seq" and options.cnn_cells:
        cells["reduce"] = chain("max_pool_3x3", "sep_conv_3x3")
        if options.cnn_cells > 2:  # see Network: fewer are all reduction cells
            cells["normal"] = chain("sep_conv_3x3", "sep_conv_3x3")
    return Genotype(**cells)

def given_genotype(options):
    """Of --genotype; the random one of the seed, the same for all folds; or the control. None of a
    baseline, and where one is searched."""
    if options.genotype is not None:
        return Genotype(**options.genotype)
    if options.model not in ("random", "skip"):
        return None
    torch.manual_seed(seed_of(options.seed, "random genotype"))
    with torch.device("meta"):
        net = network(options, 2)
    if options.model == "random":
        return random_genotype(net)
    cells = dict(net.decided)
    for kind in net.candidates:  # no operation that learns; each node reads the cell's two inputs
        op = "max_pool_3x3" if kind == "reduce" else "skip_connect"
        cells[kind] = [[(op, 0), (op, 1)]] * options.nodes
    return Genotype(**cells)

class Baseline(nn.Module):
    """Hand-designed networks: (N, 1, F, T) -> logits (N, classes). `bands`: F. Three convolutions
    with pooling (unless `cnn` is False), then bidirectional LSTM layers over the frames and their
    mean over time or, with `attention`, additive attention; without LSTM one more convolution, mean
    over the map."""
    def __init__(self, classes, bands, *, cnn=True, lstm=1, attention=False, dropout=0.3, width=64):
        super().__init__()
        self.cnn, frame = nn.Sequential(), bands
        if cnn:  # F is halved three times, T twice
            for c_in, c_out, pool in ((1, 16, 2), (16, 32, 2), (32, 64, (2, 1))):
                self.convolution(c_in, c_out)
                self.cnn.extend([nn.MaxPool2d(pool, ceil_mode=True), nn.Dropout2d(0.1)])
            frame = 64 * math.ceil(bands / 8)
        self.rnn = self.score = None
        if lstm:
            self.rnn = nn.LSTM(frame, width, lstm, batch_first=True, bidirectional=True,
                               dropout=dropout if lstm > 1 else 0.0)  # between layers
        else:
            self.convolution(64 if cnn else 1, 2 * width)
        if attention:
            hidden = nn.Linear(2 * width, width)
            self.score = nn.Sequential(hidden, nn.Tanh(), nn.Linear(width, 1))
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(2 * width, classes))

    def convolution(self, c_in, c_out):
        convolution = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        self.cnn.extend([convolution, nn.BatchNorm2d(c_out), nn.ReLU()])

    def forward(self, x):
        x = self.cnn(x)
        if self.rnn is None:
            return self.head(x.mean(dim=(2, 3)))
        x = x.flatten(1, 2).transpose(1, 2)  # (N, C, F, T) -> (N, C F, T) -> (N, T, C F)
        h, _ = self.rnn(x)  # (N, T, 2 width)
        if self.score is None:
            return self.head(h.mean(dim=1))
        a = self.score(h).softmax(dim=1)  # (N, T, 1)
        return self.head((a * h).sum(dim=1))

BASELINES = {  # name -> constructor(classes, bands): a --model, and a row of --compare
    "cnn": partial(Baseline, lstm=0),
    "lstm": partial(Baseline, cnn=False, lstm=2),
    "lstm-att": partial(Baseline, cnn=False, lstm=2, attention=True),
    "cnn-lstm": Baseline,
    "cnn-lstm-att": partial(Baseline, attention=True),
}

def known_models(pool=None):
    """All, in the table's order; but no convolution over one's own frames, without order in F."""
    names = ["emodarts", "random", "skip", *BASELINES]
    return [name for name in names if not (pool and name.startswith("cnn"))]

# Options -----------------------------------------------------------------------------------------
SCALES = {  # a scale is a set of defaults
    "paper": dict(features="log-mel-128", window=8.0, stem_stride=1, nodes=4, cnn_cells=4,
                  seq_cells=4, seq_width=0, relaxation="softmax",
                  search_epochs=50, warm_up=0, epochs=100),
    # One thread: two gain 4 % on quiet cores, and lose a factor of four and more on busy ones.
    "small": dict(features="log-mel-64", window=4.0, stem_stride=2, nodes=2, cnn_cells=3,
                  seq_cells=1, seq_width=64, relaxation="sample",
                  search_epochs=100, warm_up=20, epochs=30, threads=1),
}
# No part of KEY: a result does not depend on them, but for rounding.
NOT_SETTINGS = ["out", "root", "frames", "cache", "folds", "skip_bad", "device", "threads"]
NOT_SETTINGS += ["dry_run", "seeds", "compare", "predict", "from_"]
OF_A_RUN = ["model", "seed", "genotype"]  # no part of KEY either: they name a folder below

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(message)  # one line, as for all other bad input

def at_least(least, kind=int, below=math.inf):
    """An argparse type."""
    def number(text):
        value = kind(text)
        if not least <= value < below:  # nor is NaN
            raise argparse.ArgumentTypeError(f"is {text}, expected {least} or more, below {below}")
        return value
    return number

def numbers(text):
    return sorted(set(map(int, text.split(","))))

def genotype_file(file):
    """An argparse type: the cells that the file holds, whatever its name is."""
    try:
        return Genotype.from_json(Path(file).read_text(encoding="utf-8")).cells()
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{file}: {error}") from None

def parse(argv):
    """Command line -> options. Corpus and scale are read first: they bring other defaults."""
    how = dict(usage="python train.py [options]", allow_abbrev=False)
    how["formatter_class"] = argparse.ArgumentDefaultsHelpFormatter
    first = Parser(add_help=False, **how)
    add = first.add_argument
    add("--dataset", choices=CORPORA, help="the corpus; None: smoke, with --from no corpus")
    add("--scale", choices=SCALES, help="a set of defaults; None: as suits the corpus")
    add("--recipe", choices=("ours", "authors"), default="ours", help="how networks are trained")
    add("--protocol", choices=("standard", "paper"), default="standard",
        help="folds, labels and subsets; paper: those of the emoDARTS authors")
    add("--features", default="", help="mfcc-N, log-mel-N, or npy-D: your frames of D numbers")
    known, _ = first.parse_known_args(argv)
    corpus = CORPORA[known.dataset or "smoke"]
    scale = known.scale or corpus.scale
    parser = Parser(description=__doc__.splitlines()[0], parents=[first], **how)
    add_options(parser)
    add_method_options(parser)
    parser.set_defaults(scale=scale, folds=corpus.folds or None, **SCALES[scale])
    if known.features.startswith("npy"):  # 64 steps: 3.84 s at the usual 50 frames a second
        width = SCALES[scale]["seq_width"] or 128
        parser.set_defaults(window=192.0, pool=3, cnn_cells=0, seq_width=width)
    if known.recipe == "authors":
        parser.set_defaults(features="mfcc-128", alpha_lr=3e-4)
    if known.protocol == "paper":
        parser.set_defaults(validation="none")
    options = parser.parse_args(argv)
    options.dataset = options.dataset or (None if options.from_ else "smoke")
    mine = "".join(linecache.getlines(__file__, globals()))  # also from a zip
    names = repr([*CNN_OPS, *SEQ_OPS, *BASELINES])  # a caller may have added some
    options.code = code_digest(inspect.getsource(emodarts), features.SOURCE, mine, names)
    options.data = None  # the corpus' digest, once it is read
    return options

def add_options(parser):
    add = parser.add_argument_group("data").add_argument
    add("--root", help="folder of the corpus, or file of csv; None: data/DATASET")
    add("--frames", help="folder of npy-D's files; None: beside the recordings")
    add("--classes", choices=("four", "all"), default="four",
        help="four of the labels, or all; of csv always all")
    add("--validation", choices=("next", "none"), default="next",
        help="the group behind the test speakers validates, or trains as well")
    add("--folds", type=numbers, help="folds to run, such as 0,3; None: all")
    add("--skip-bad", action="store_true", help="leave out recordings that cannot be used")
    add("--poison", type=at_least(0, float, 1), default=0.0, help="share of tests to train on")
    add("--normalise", choices=("train", "speaker"), default="train",
        help="by mean and deviation of the training speakers, or of each speaker")
    add("--cache", default="cache", help="folder of the computed features")

    add = parser.add_argument_group("sizes").add_argument
    add("--window", type=float, help="seconds of a window, frames of npy-D")
    add("--pool", type=at_least(1), help="neighbouring frames of npy-D that are averaged")
    add("--channels", type=int, default=8, help="of CNN cells before a reduction")
    add("--cnn-cells", type=int, help="number of CNN cells; 0 searches a SeqNN only")
    add("--seq-cells", type=int, help="number of SeqNN cells; 0 searches a CNN only")
    add("--nodes", type=int, help="nodes in each cell")
    add("--stem-stride", type=int, help="2 halves the map before the first cell")
    add("--seq-width", type=int, help="width of projected frames; 0: their mean over F")

def add_method_options(parser):
    add = parser.add_argument_group("search and training").add_argument
    add("--model", choices=known_models(), default="emodarts",
        help="searched, a random genotype, skip connections only, or designed by hand")
    add("--search", choices=("joint", "cnn", "seq"), default="joint", help="which cells to search")
    add("--genotype", type=genotype_file, metavar="FILE", help="train this one, without a search")
    add("--relaxation", choices=RELAXATIONS, help="all operations of an edge, or one is drawn")
    add("--order", type=int, choices=(1, 2), default=1, help="order of the hypergradient")
    add("--seq-space", choices=SEQ_SPACES, default="all", help="candidate SeqNN operations")
    add("--search-epochs", type=at_least(1), help="epochs of the search")
    add("--warm-up", type=at_least(0), help="the first of these, in which alphas wait")
    add("--alpha-lr", type=at_least(0, float), default=0.01, help="the alphas' learning rate")
    add("--size-penalty", type=at_least(0, float), default=0.0,
        help="added to the alphas' loss for each million of expected weights")
    add("--epochs", type=at_least(1), help="epochs of the training")
    add("--batch", type=at_least(2), default=16, help="batch size of search and training")
    add("--lr", type=at_least(0, float), help="largest learning rate; None: the recipe's")

    add = parser.add_argument_group("run").add_argument
    add("--out", help="folder of results; None: runs/DATASET-SCALE-KEY, KEY of settings")
    add("--seed", type=at_least(0), default=0, help="seed of everything that is random")
    add("--seeds", type=at_least(1), default=1, help="number of seeds, from --seed on")
    add("--compare", type=at_least(0), nargs="?", const=10, metavar="N",
        help="run all other models as well, and N random genotypes (10)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: a GPU if there is one")
    add("--amp", action="store_true", help="mixed precision (bfloat16), which pays on a GPU")
    add("--threads", type=at_least(1, below=1000), help="CPU threads; None: torch's choice")
    add("--dry-run", action="store_true", help="say what would happen, and what it costs")
    add("--from", dest="from_", metavar="RUN", help="test its models on --dataset, or --predict")
    add("--predict", nargs="+", metavar="CLIP", help="files that --from's models recognise")

def check(options):
    """Refuses sizes and choices that cannot work together, before anything is computed."""
    known = known_models(options.pool)
    if options.model not in known:
        raise InputError(f"--model {options.model} is for bands; npy-D: {', '.join(known)}")
    if options.genotype and options.model != "emodarts":
        raise InputError(f"--genotype goes with --model emodarts, not {options.model}")
    if searches(options) and options.warm_up >= options.search_epochs:
        raise InputError(f"--warm-up is {options.warm_up}, expected less than --search-epochs")
    try:
        with torch.device("meta"):
            net = network(options, 2, given_genotype(options))
            if searches(options):
                Architect(net, None, order=options.order)
    except (ValueError, RuntimeError) as error:  # as torch says it of sizes beyond all memory
        raise InputError(error) from None

def settings_of(options, without=()):
    """What a result depends on, as JSON has it: options, and digests of data and code."""
    left_out = {*NOT_SETTINGS, *without}
    kept = {name: value for name, value in vars(options).items() if name not in left_out}
    return json.loads(json.dumps(kept))

def digest_of(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]

def model_name(options):
    """Of a row in the table: a given genotype is a model of its own."""
    return f"genotype-{digest_of(options.genotype)}" if options.genotype else options.model

def corpus_folder(options):
    """Of all runs of a corpus with the same settings."""
    key = digest_of(settings_of(options, without=OF_A_RUN))
    return Path(options.out or f"runs/{options.dataset}-{options.scale}-{key}")

def folder_of(options, k=None):
    """Of a run, a model and a seed, or of its fold k."""
    run = corpus_folder(options) / f"{model_name(options)}-seed{options.seed}"
    return run if k is None else run / f"fold{k}"

# The command -------------------------------------------------------------------------------------
def command(options):
    """Reads the corpus, computes folds that no other process holds; the last process prints."""
    with suppress(AttributeError, TypeError):  # glibc gives memory back and asks for it again, a
        mallopt = ctypes.CDLL(None).mallopt  # tenth of a step's time; other libcs have no mallopt
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, its largest
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.predict or options.from_ is not None:
        return use(options)
    device = pick_device(options.device, options.amp)
    map_settings(options)  # refuses what there cannot be
    listing = listing_of(options, options.pool)
    options.data = listing.digest
    runs = plan(options)
    for run in {model_name(run): run for run in runs}.values():  # seeds change no sizes
        check(run)
    validate = options.validation == "next"
    count = len(features.folds(listing, chosen=(), validate=validate))
    chosen = options.folds or list(range(count))
    if not set(chosen) <= set(range(count)):
        raise InputError(f"--folds is {chosen}, expected numbers from 0 to {count - 1}")
    features.folds(listing, (), chosen, validate)  # what cannot be is refused before anything
    finished_results(options)  # is computed, and a folder of other settings
    data = data_of(options, listing, listing.classes, device)
    splits = features.folds(listing, data.bad, chosen, validate)
    if options.poison:
        for k, split in enumerate(splits):
            splits[k] = poisoned(split, k, options.poison, data.labels)
    if options.dry_run:
        return dry_run(options, runs, data, {k: splits[k] for k in chosen})
    jobs = list(itertools.product(runs, chosen))
    if not work(jobs, lambda run, k: run_fold(run, k, data, splits[k])):
        return say("other processes have the rest; the last one prints the table")
    with lock(corpus_folder(options) / "lock"):  # another process may end at the same moment
        for run in runs:
            finish(run, [k for k in range(count) if result_of(run, k)])  # earlier ones too
        compare(options, [k for k in range(count) if all(result_of(run, k) for run in runs)])

def plan(options):
    """Options of the command's runs, one for each model and seed; first what takes longest."""
    seeds = range(options.seed, options.seed + options.seeds)
    wanted = [(options.model, seed, options.genotype) for seed in seeds]
    if options.compare is not None:
        others = [model for model in known_models(options.pool) if model != "random"]
        wanted += [(model, seed, None) for model in others for seed in seeds]
        wanted += [("random", options.seed + n, None) for n in range(options.compare)]
    runs = []
    for model, seed, genotype in wanted:
        run = argparse.Namespace(**vars(options))
        run.model, run.seed, run.genotype = model, seed, genotype
        if run not in runs:  # each once
            runs.append(run)
    return runs

def map_settings(options):
    return Settings(options.features, options.window, options.pool)

def listing_of(options, pool):
    """The corpus of --dataset; with a `pool` the user's frames in the place of its recordings."""
    listing = read_corpus(options.dataset, options.root, options.classes, options.protocol)
    if options.frames and not pool:
        raise InputError(f"--frames is {options.frames}; expected none, but with npy-D")
    if pool and not options.from_:
        features.folds(listing, chosen=(), validate=False)  # no recording is on two sides
    if pool:
        listing = with_frames(listing, options.frames)
    return listing

def data_of(options, listing, classes, device):
    data = Data(listing, map_settings(options), classes=classes, device=device,
                normalise=options.normalise, cache=options.cache, skip_bad=options.skip_bad,
                progress=say)
    for why in data.bad.values():
        say(f"skipped: {why}")
    return data

def pick_device(name, amp=False):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":  # torchrun gives each process of a machine a number, and so a GPU
        name += ":" + os.environ.get("LOCAL_RANK", "0")
    try:  # the processor of a machine may lack bfloat16
        with torch.autocast(torch.device(name).type, torch.bfloat16, enabled=amp):
            nn.LSTM(1, 1).to(name)(torch.ones(1, 1, 1, device=name))
    except Exception as error:  # what torch raises depends on the device
        how = f"--device {name}{' with --amp' * amp} cannot be used here"
        raise InputError(f"{how} ({error!s:.150}); cpu without --amp always can") from None
    return torch.device(name)

def work(jobs, compute):
    """Computes the jobs that are neither finished nor in the hands of another shell, a cluster's
    job, a rank of torchrun. A dead process' lock is free. -> whether all are done; nobody waits"""
    for run, k in jobs:
        if result_of(run, k):
            continue
        with lock(folder_of(run, k) / "lock", wait=False) as mine:
            if mine and not result_of(run, k):
                compute(run, k)
    return all(result_of(run, k) for run, k in jobs)

# What outlives the process -----------------------------------------------------------------------
# Files are whole or not there, and a checkpoint holds whole epochs. Kill, power cut and Ctrl-C are
# one case. What is read back is data: nothing is executed.
SAVE_EVERY = 30  # seconds between two checkpoints, and as many times what the last one took

class Checkpoint:
    """Where a fold stands: stage, epochs that are done, rows of log.csv, what the search found; and
    as `parts` the networks and optimisers of the stage. Now and then it is saved."""
    KEPT = ["fold", "settings", "stage", "epoch", "rows", "genotype", "decision"]

    def __init__(self, options, fold):
        self.options, self.settings, self.fold = options, settings_of(options), fold
        self.title = f"{model_name(options)}, seed {options.seed}, fold {fold}"
        self.file = folder_of(options, fold) / "checkpoint.pt"
        self.stage, self.epoch, self.step, self.rows = "search", 0, 0, []
        self.genotype = self.decision = None
        self.parts, self.states = {}, {}  # states of a file wait there for `restore`
        self.next_save = time.perf_counter() + SAVE_EVERY
        if self.file.exists():
            with reading(self.file):
                state = torch.load(self.file, map_location="cpu", weights_only=True)
                if state["fold"] != fold:
                    raise ValueError("it is of another fold")
                refuse_another_run(self.file, state["settings"], self.settings)
                for name in [*self.KEPT, "states"]:
                    setattr(self, name, state[name])
            say(f"goes on with {self.where()}")

    def where(self):
        return f"{self.title}, {self.stage}, epoch {self.epoch + 1}, step {self.step + 1}"

    def save(self):
        began = time.perf_counter()
        state = {name: getattr(self, name) for name in self.KEPT}
        state["states"] = {name: part.state_dict() for name, part in self.parts.items()}
        write(self.file, partial(torch.save, state))
        now = time.perf_counter()
        self.next_save = now + SAVE_EVERY + SAVE_EVERY * (now - began)

    def restore(self, **parts):
        """The parts of this stage, new ones, become what they were when the file was written."""
        if self.states:
            with reading(self.file):
                for name, part in parts.items():
                    part.load_state_dict(self.states[name])
        self.parts, self.states = parts, {}
        self.epoch_began = time.perf_counter()

    def epoch_done(self, row):
        """Logs an epoch, and saves when it is time."""
        now = time.perf_counter()
        row["seconds"], self.epoch_began = now - self.epoch_began, now
        row = {name: float(f"{value:.9g}") for name, value in row.items()}
        self.epoch += 1
        self.rows.append({"stage": self.stage, "epoch": self.epoch} | row)
        out = io.StringIO(newline="")
        log = csv.DictWriter(out, list(dict.fromkeys(itertools.chain(*self.rows))))
        log.writeheader()
        log.writerows(self.rows)
        write(self.file.with_name("log.csv"), out.getvalue())
        run = self.options
        epochs, left = run.epochs, run.epochs - self.epoch
        if self.stage == "search":  # epochs of the training take as long: a guess
            epochs, left = run.search_epochs, run.search_epochs - self.epoch + run.epochs
        values = "  ".join(f"{name} {value:.4g}" for name, value in row.items())
        say(f"{self.title}  {self.stage} {self.epoch}/{epochs}  {values}  "
            f"{left * row['seconds']:.0f} s left")
        if now >= self.next_save:
            self.save()

    def search_done(self, genotype, decision):
        self.genotype, self.decision = genotype and genotype.cells(), decision
        self.stage, self.epoch, self.parts = "train", 0, {}
        self.save()

@contextmanager
def reading(file):
    """Inside, a file is read. A damaged one may provoke anything: it becomes one line."""
    try:
        with naming(file):
            yield file
    except Exception as error:
        if isinstance(error, InputError) or "memory" in str(error):  # as torch says it
            raise
        why = f"damaged, or of other code ({error!r:.150})"
        raise InputError(f"{file} is {why}; delete it, or name another") from None

def refuse_another_run(file, theirs, mine):
    """Settings in a file must be those of the command."""
    differ = [name for name in mine if theirs.get(name) != mine[name]]
    if not differ:
        return
    what = "other settings:"
    for name in differ:
        what += f" {name} {theirs.get(name)!s:.60} there, {mine[name]!s:.60} here;"
    if "code" in differ:
        what = "other code: emodarts.py, features.py or train.py has changed;"
    elif differ == ["data"]:
        what = "other data: recordings, labels, speakers or splits;"
    raise InputError(f"{file} is of {what} give another --out")

def read_result(file, mine):
    """-> what result.json says of a fold, and its `folder`. `mine`: settings it must have."""
    with reading(file):
        result = json.loads(file.read_bytes())
        refuse_another_run(file, result["settings"], mine)
        place = f"{result['model']}-seed{result['seed']}", f"fold{result['fold']}"
    if file.parent.parts[-2:] != place:
        raise InputError(f"{file} is of {'/'.join(place)}; move it there, or away")
    return result | {"folder": file.parent}  # where it lies now

def result_of(options, k):
    """The result of a fold; None while there is none."""
    file = folder_of(options, k) / "result.json"
    return read_result(file, settings_of(options)) if file.exists() else None

def finished_results(options):
    """All in the folder, whoever computed them. Refuses other data, code or settings."""
    mine = settings_of(options, without=OF_A_RUN)
    files = sorted(corpus_folder(options).glob("*/fold*/result.json"))
    return [read_result(file, mine) for file in files]

def by_run(results, chosen):
    """(model, seed) -> results of the chosen folds, if all are there; with none chosen, of all."""
    runs = {}
    for result in results:
        folds = runs.setdefault((result["model"], result["seed"]), {})
        folds[result["fold"]] = result
    whole, place = {}, {name: k for k, name in enumerate(known_models())}
    for run in sorted(runs, key=lambda run: (place.get(run[0], 99), run)):  # genotypes: behind
        if set(chosen) <= set(runs[run]):
            whole[run] = [runs[run][k] for k in chosen or sorted(runs[run])]
    shown = list(itertools.chain(*whole.values()))
    hidden = [str(result["folder"]) for result in results if result not in shown]
    if hidden:
        warn(f"not in the table of all models, for which each must have the folds {chosen}: "
             f"{listed(hidden)}; name all folds, models and seeds in one command")
    return whole

def say(text):
    print(text + "\n", end="", flush=True)  # in one write: processes share a log

# Tables: functions of the result.json files alone, so that they can be made again at any time -----
def notes_of(options, classes, bad):
    legend = "; ".join(f"{name}: {METRICS[name].__doc__ or 'see METRICS'}" for name in METRICS)
    notes = [f"in percent, {legend}; chance: UA {100 / len(classes):.3g}"]
    if options.dataset == "smoke":
        notes.append("smoke is a smoke test with generated sounds, not speech")
    if options.normalise == "speaker":
        notes.append("each speaker is normalised by unlabelled audio, test speakers too")
    if options.validation == "none":
        notes.append("the validation speakers train as well")
    if options.poison:
        share = f"{100 * options.poison:g} % of each class' test utterances, rounded down,"
        notes.append(f"not speaker-independent: {share} were moved to the training")
    if options.genotype:
        notes.append("the genotype was given: if its search saw test speakers, they chose it")
    if bad:
        notes.append(f"{len(bad)} unusable recordings were skipped")
    return notes

def percent(value):
    return f"{100 * value:.1f}"

def spread(values):
    """(seeds, folds) -> mean ± deviation (ddof 1) over folds (± over seeds), in percent."""
    text = percent(values.mean())
    seeds, folds = values.shape
    if folds > 1:
        text += f" ± {percent(values.mean(axis=0).std(ddof=1))}"
    if seeds > 1:
        text += f" (± {percent(values.mean(axis=1).std(ddof=1))})"
    return text

def values_of(seeds, test, metric):
    """`seeds`: results, [seed][fold]. -> a metric of each, (seeds, folds)"""
    values = []
    for results in seeds:
        values.append([metric(confusion_of([result], test)) for result in results])
    return np.array(values)

def confusion_of(results, test):
    """The confusion matrix of all these folds together."""
    return np.sum([result["tests"][test]["confusion"] for result in results], axis=0)

def markdown(head, rows):
    """A table in Markdown, aligned for those who read it as it is; rows may end early."""
    lines = []
    for row in (head, *rows):
        lines.append([str(cell) for cell in row] + [""] * (len(head) - len(row)))
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)

def table(results, test, cell=str):
    """What a run ends with: a row for each fold; mean, deviation and pooled metrics."""
    rows, mean, pooled = [], ["mean ± std", "", "", ""], ["pooled", "", "", ""]
    for result in results:
        matrix = confusion_of([result], test)
        speakers = cell(listed(result["tests"][test]["speakers"], 4))
        row = [result["fold"], speakers, cell(listed(result["validation"], 4)), matrix.sum()]
        row += [percent(metric(matrix)) for metric in METRICS.values()]
        row.append(f"{result['parameters']:,}")
        for seconds in result.get("seconds", {}).values():  # a model.pt does not know
            row.append(f"{seconds:.0f} s")
        rows.append(row)
    for metric in METRICS.values():
        mean.append(spread(values_of([results], test, metric)))
        pooled.append(percent(metric(confusion_of(results, test))))
    head = ["fold", test, "validation", "utterances", *METRICS, "parameters", "search", "training"]
    return markdown(head, [*rows, mean, pooled])

def best_epoch(results):
    """A note, in a list, where the log has followed the test speakers."""
    if "test_ua" not in results[0]["log"][-1]:
        return []
    said = "best epoch on all test speakers, as the authors count:"
    for name in METRICS:
        best = []
        for result in results:
            best.append(max(row.get(f"test_{name.lower()}", 0) for row in result["log"]))
        said += f" {name} {percent(np.mean(best))}"
    return [said]

def finish(run, chosen):
    """Of a run that is finished: writes results.json and report.md, then prints the table."""
    results = [result_of(run, k) for k in chosen]
    folder = folder_of(run)
    for result in results:
        del result["folder"], result["seen"]  # a path; a line for each recording
    write(folder / "results.json", json.dumps({"settings": settings_of(run), "folds": results}))
    write(folder / "report.md", report(results, run))
    print(f"\n{run.dataset}, protocol {run.protocol}: {model_name(run)}, seed {run.seed}")
    tables = [table(results, test) for test in results[0]["tests"]]
    print(*tables, *best_epoch(results), *results[0]["notes"], sep="\n")
    print(f"report.md, models, logs and predictions are in {folder}")

# The table of all models and seeds ---------------------------------------------------------------
def compare(options, chosen):
    """Writes and prints the table of all runs in the folder, whoever computed them."""
    runs, folder = by_run(finished_results(options), chosen), corpus_folder(options)
    rows, text = comparison(runs)
    about = {"settings": settings_of(options, without=OF_A_RUN), "rows": rows}
    write(folder / "results.json", json.dumps(about, indent=1))
    write(folder / "table.md", text + "\n")
    if len(runs) > 1:
        print(f"\n{text}\n\nof all that is finished in {folder}, as table.md")

def comparison(runs):
    """`runs`: see `by_run`. -> a row for each model and for the ensemble of its seeds, {column:
    cell}, with the figures that the cells were made of; and the table in Markdown"""
    models, rows = {}, []  # name -> for each seed the results of its folds
    for (name, _), results in runs.items():
        models.setdefault(name, []).append(results)
    first, *_ = models.values()
    for test in first[0][0]["tests"]:
        ensembles = {}
        for name, seeds in models.items():
            rows.append(row_of(name, seeds, test, first))
            together = ensemble(seeds, test)
            if together:
                ensembles[f"{name}, ensemble of {len(seeds)}"] = [together]
        for name, seeds in ensembles.items():
            rows.append(row_of(name, seeds, test, next(iter(ensembles.values()))))
    heads = [name for name, cell in rows[0].items() if not isinstance(cell, list)]
    cells = [[str(row.get(name, "")) for name in heads] for row in rows]
    folds = ", ".join(str(result["fold"]) for result in first[0])
    legend = (f"mean ± standard deviation over folds {folds} (± over seeds); p: paired t-test of "
              "UA over folds against the set's first row, of ensembles against their first")
    notes = {}  # each once
    for seeds in models.values():
        notes |= dict.fromkeys(seeds[0][0]["notes"])
    return rows, "\n".join([markdown(heads, cells), legend, *notes])

def row_of(name, seeds, test, first):
    """`seeds`: a model's results, [seed][fold]; `first`: those of the model that p refers to."""
    results = list(itertools.chain(*seeds))
    values = {metric: values_of(seeds, test, METRICS[metric]) for metric in METRICS}
    row = {"set": test, "model": name, "seeds": len(seeds), "p": ""}
    # A paired t-test over folds, averaged over seeds; not of one fold, nor of the same in all.
    difference = values["UA"].mean(axis=0) - values_of(first, test, ua).mean(axis=0)
    if len(difference) > 1 and np.ptp(difference) >= 1e-12:
        row["p"] = f"{stats.ttest_1samp(difference, 0).pvalue:.2g}"
    seen = [result.get("validation_ua") for result in results]
    if None not in seen:
        values["validation UA"] = np.reshape(seen, (len(seeds), -1))
    for metric, value in values.items():
        row[metric] = spread(value)
        row[f"{metric} of seeds, folds"] = value.tolist()
    if "parameters" in results[0]:  # an ensemble has no single number
        row["weights"] = f"{np.mean([result['parameters'] for result in results]):,.0f}"
    if "seconds" in results[0]:  # a model.pt does not know
        for stage in ("search", "train"):
            seconds = [result["seconds"][stage] for result in results]
            row[stage] = f"{np.mean(seconds):.0f} s"
    return row

def ensemble(seeds, test):
    """A model's seeds -> results of its folds when their logits are averaged; [] of a single seed,
    and of seeds that were tested on different utterances (--skip-bad). predictions.csv has
    probabilities: their logarithms are the logits, up to a constant for each utterance."""
    folds = []
    for results in zip(*seeds):  # of a fold, one for each seed
        utterances, total = [], 0
        for result in results:
            with reading(result["folder"] / result["tests"][test]["predictions"]) as file:
                text = file.read_text(encoding="utf-8", errors="surrogateescape")
                _, *rows = csv.reader(io.StringIO(text, newline=""))
                utterances.append([row[:2] for row in rows])  # name and label
                p = np.array([row[3:] for row in rows], dtype=float)
                if len(rows) != np.sum(result["tests"][test]["confusion"]):
                    raise ValueError("rows are missing")
            if len(results) < 2 or utterances[-1] != utterances[0]:
                return []
            total = total + np.log(np.maximum(p, 1e-300))
        labels = [result["classes"].index(label) for _, label in utterances[0]]
        confusion = confusion_matrix(labels, torch.from_numpy(total))
        folds.append({"tests": {test: {"confusion": confusion}}})
    return folds

# report.md ---------------------------------------------------------------------------------------
def report(results, options):
    """Made of the results alone. -> Markdown, with Mermaid graphs."""
    first, dataset = results[0], plain(options.dataset)
    text = [f"# {dataset}, protocol {options.protocol}: {first['model']}, seed {options.seed}"]
    text += ["## Results", *map(plain, first["notes"])]
    text += [table(results, test, plain) for test in first["tests"]]
    text += best_epoch(results)
    text += ["## Confusion", "Rows: what it was. Columns: what it was taken for."]
    text += [confusion_table(results, test) for test in first["tests"]]
    if first["decision"]:
        text += ["## Has the search decided?", decision_text(results, options)]
    if first["genotype"]:  # none of a baseline
        text += ["## The genotypes", "A search that collapses has skip_connect nearly everywhere."]
        for result in results:
            text.append(f"### Fold {result['fold']}")
            text += itertools.starmap(graph, result["genotype"].items())
    text += ["## Learning curves", "Means over the folds, epoch by epoch."]
    text += [curves(results, stage) for stage in ("search", "train")]
    rows = [[name, plain(value)] for name, value in first["settings"].items()]
    rows.append(["made by", first["versions"]])
    text += ["## Settings", markdown(["setting", "value"], rows)]
    return "\n\n".join(filter(None, text)) + "\n"

def plain(text):
    """For Markdown, in which a corpus' names may mean something."""
    return re.sub(r"([\\`*_{}\[\]<>|#~&$!])", r"\\\1", " ".join(str(text).split()))

def confusion_table(results, test):
    matrix = confusion_of(results, test)
    classes = list(map(plain, results[0]["classes"]))
    rows = []
    for k, name in enumerate(classes):
        recall = percent(matrix[k, k] / matrix[k].sum()) if matrix[k].any() else "-"
        rows.append([name, *matrix[k], recall])
    return markdown([test, *classes, "recall, %"], rows)

def decision_text(results, options):
    mean = {}
    for name in results[0]["decision"]:
        mean[name] = np.mean([result["decision"][name] for result in results])
    text = ("Entropy of the alphas (1: undecided, 0: decided): {entropy:.4f}. Validation UA (else "
            "training UA) of the supernet's weights with all operations: {ua_all_operations:.3f}, "
            "with the genotype's: {ua_of_genotype:.3f}.")
    if len(results) > 1:
        text += " " + agreement([result["genotype"] for result in results], options)
    return text.format(**mean)

def agreement(genotypes, options):
    """How many searched edges two folds have in common, on average over pairs of folds, and how
    many two random genotypes would."""
    fixed, sets, by_chance = fixed_cells(options).cells(), [], 0.0
    for genotype in genotypes:
        edges = set()
        for kind in genotype.keys() - fixed.keys():
            for i, node in enumerate(genotype[kind], start=2):
                edges.update((kind, i, *edge) for edge in node)
        sets.append(edges)
    common = np.mean([len(a & b) for a, b in itertools.combinations(sets, 2)])
    for kind, i, _, _ in sets[0]:
        operations = SEQ_SPACES[options.seq_space] if kind == "seq" else CNN_OPS
        # A random genotype keeps 2 of a node's i predecessors, and any operation but `none`.
        by_chance += 2 / i / (len(operations) - 1)
    return (f"Two folds have {common:.1f} of {len(sets[0])} edges in common, two random genotypes "
            f"{by_chance:.1f}.")

def graph(kind, cell):
    """A cell as a Mermaid graph: states 0 and 1 are its inputs, the others its nodes."""
    lines = ["```mermaid", "graph LR", f'    s0(["{kind}: input 0"])', '    s1(["input 1"])']
    for i, node in enumerate(cell, start=2):
        lines.append(f'    s{i}["node {i}"]')
        lines += [f'    s{j} -->|"{op}"| s{i}' for op, j in node]
        lines.append(f'    s{i} --> out(["output"])')
    return "\n".join([*lines, "```"])

def curves(results, stage):
    """Loss and metrics of validation speakers as a Mermaid chart, whose title is the legend."""
    names, lines = [], []
    for column in ["loss", *(f"val_{metric.lower()}" for metric in METRICS)]:
        logs = []
        for result in results:
            rows = [row for row in result["log"] if row["stage"] == stage]
            logs.append([row[column] for row in rows if column in row])
        points = [f"{value:.6g}" for value in map(np.mean, zip(*logs))]
        if len(points) > 1:
            names.append(column)
            lines.append(f"    line [{', '.join(points)}]")
    if not lines:  # a baseline has no search
        return ""
    title = f'    title "{stage}: {", ".join(names)}"'
    return "\n".join(["```mermaid", "xychart-beta", title, *lines, "```"])

# What it will cost -------------------------------------------------------------------------------
def dry_run(options, runs, data, splits):
    """Says what there is, what would happen, and what it costs here, measured on noise."""
    runs = [run for run in runs if not all(result_of(run, k) for k in splits)]
    windows = np.diff(data.first)  # of each utterance
    length, unit = f"{data.length.sum() / 60:.1f} minutes", "s"
    if options.pool:
        length, unit = f"{data.length.sum():,.0f} frames", "frames"
    usable = data.labels[windows > 0]
    labels = [f"{n} {name}" for name, n in zip(data.classes, np.bincount(usable))]
    print(f"corpus    {options.dataset}, protocol {options.protocol}: {len(usable)} utterances "
          f"({', '.join(labels)}), {length}, {windows.sum()} windows of {options.window:g} {unit}")
    steps = {"alpha step": 0, "weight step": 0, "training step": 0}
    for k, split in splits.items():
        sides = []
        for side, members in split.sides().items():
            sides.append(f"{side} {listed(data.speakers(members))} ({len(members)})")
        print(f"fold {k:<4} ", ", ".join(sides))
        half = math.ceil(windows[split.train[::2]].sum() / options.batch)
        whole = math.ceil(windows[split.train].sum() / options.batch)
        steps["alpha step"] += half * (options.search_epochs - options.warm_up)
        steps["weight step"] += half * options.search_epochs
        steps["training step"] += whole * options.epochs
    total, most = 0.0, 0.0
    for model in dict.fromkeys(map(model_name, runs)):
        same = [run for run in runs if model_name(run) == model]
        for kind, step in steps_of(same[0], len(data.classes), data.device):
            peak_memory(data.device)  # from here on
            seconds, count = seconds_of(step), steps[kind] * len(same)
            peak = peak_memory(data.device) or 0.0  # where it is not known
            total, most = total + count * seconds, max(most, peak)
            print(f"cost      {model}, {kind}: {count:,} of {seconds:.3g} s, {gigabytes(peak)}")
    print(f"in all    {total:,.0f} s ({total / 3600:.1f} h) on {data.device}, {gigabytes(most)}; "
          f"nothing was trained; a run goes to {corpus_folder(options)}")

def gigabytes(most):
    return f"{most:.3g} GB" if most else "memory not known"

def steps_of(options, classes, device):
    """-> for each kind of step its name and a function that makes one, with noise of the real size.
    One by one: a supernet is gone before the steps of its derived network are measured."""
    x = torch.randn(options.batch, 1, *map_settings(options).shape, device=device)
    target = torch.arange(options.batch, device=device) % classes

    def step(net, optimizer, constants=()):
        with held_fixed(constants):
            weight_step(F.cross_entropy(forward(net, x, options), target), optimizer)
    genotype = given_genotype(options)
    if searches(options):
        net = network(options, classes).to(device)
        genotype = derive(net)
        architect, batch = Architect(net, F.cross_entropy, order=options.order), (x, target)
        yield "alpha step", partial(alpha_step, architect, batch, batch, 1e-3, options)
        optimizer = optimizer_of(net.weights(), options)
        for p in net.weights():  # a whole search draws all, and so has a state of each
            p.grad = torch.zeros_like(p)
        optimizer.step()
        yield "weight step", partial(step, net, optimizer, net.alphas())
        del architect, optimizer
    net = network(options, classes, genotype).to(device)
    yield "training step", partial(step, net, optimizer_of(net.parameters(), options))

def seconds_of(step):
    """The median of the later steps: the first are slower, and sampled ones are not alike."""
    times = []
    while len(times) < 5 or (len(times) < 30 and sum(times) < 30):
        began = time.perf_counter()
        step()  # ends with loss.item(), for which a GPU must be done with all before
        times.append(time.perf_counter() - began)
    return float(np.median(times[len(times) // 2 :]))

def peak_memory(device):
    """Most GB since the last call, of tensors on a GPU, else of the process; None if not known."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 1e9
        torch.cuda.reset_peak_memory_stats(device)
        return round(peak, 3)
    with suppress(AttributeError, TypeError):  # what `command` keeps would count
        ctypes.CDLL(None).malloc_trim(0)
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    found = re.search(r"VmHWM:\s+(\d+)", status)  # not where a sandbox makes its own /proc
    return round(int(found[1]) * 1024 / 1e9, 3) if found else None

# The use of finished models ----------------------------------------------------------------------
def read_model(file):
    with reading(file):
        found = torch.load(file, map_location="cpu", weights_only=True)
        about = json.loads(found["about"])
        options = argparse.Namespace(**about["settings"] | {"amp": False})  # for any device
        genotype = Genotype(**about["genotype"]) if about["genotype"] else None
        # Whatever sizes a file announces, memory is taken for the weights that it holds.
        with torch.device("meta"):
            net = network(options, len(about["classes"]), genotype).eval()
        net.load_state_dict(found["weights"], assign=True)
        return argparse.Namespace(about=about, options=options, net=net, folder=file.parent,
                                  mean_std=found["mean_std"])  # None: each speaker has one's own

def use(options):
    """--from RUN: recognises clips, or scores a corpus."""
    folder = Path(options.from_ or "")
    files = [folder] if folder.is_file() else []
    for pattern in ("model.pt", "fold*/model.pt", "*/fold*/model.pt"):
        files += sorted(folder.glob(pattern))
    if not options.from_ or not files:
        raise InputError(f"--from is {options.from_}, expected a folder with models")
    if options.dry_run:
        raise InputError("--dry-run does not go with --from")
    models = [read_model(file) for file in files]
    if any(model.options.code != options.code for model in models):
        warn("other code made these models: do features and networks still mean the same?")
    settings = [settings_of(model.options, [*OF_A_RUN, "code"]) for model in models]
    if any(other != settings[0] for other in settings):
        raise InputError(f"{folder} has models of several settings or corpora; name one of them")
    if options.predict:
        return recognise(models, options.predict)
    if options.dataset:
        return score_corpus(models, options)
    raise InputError("--from goes with --predict CLIP..., or with --dataset")

@torch.no_grad()
def recognise(models, clips):
    """By the mean of the models' logits."""
    names = sorted({f"{model.about['model']}-seed{model.about['seed']}" for model in models})
    if len(names) > 1:
        raise InputError(f"--from has several runs; name one of RUN/{listed(names)}")
    classes, options = models[0].about["classes"], models[0].options  # of all folds of a run
    settings = map_settings(options)
    maps = {}  # clip -> (windows, F, T), rounded as in training
    for clip in clips:
        maps[clip] = features.maps_of(features.read(clip, settings), settings).float()
        if not settings.pool and features.channels_cancel(clip):
            warn(f"the channels of {clip} cancel in their mean")
    if options.normalise == "speaker":
        print("all clips are normalised together, as if of one speaker")
    own = features.mean_std(maps.values())
    for clip in clips:
        logits = []
        for model in models:
            mean, std = model.mean_std or own
            x = (maps[clip] - mean[:, None]) / std[:, None]
            for part in x[:, None].split(64):
                logits.append(forward(model.net, part, model.options).double())
        p = torch.cat(logits).mean(0).softmax(0)  # all models have the same number of windows
        values = "  ".join(f"{name} {value:.3f}" for name, value in zip(classes, p))
        print(f"{clip}  {classes[p.argmax()]}  {values}")

def score_corpus(models, options):
    """The tables of finished models on a corpus of which they have seen no recording."""
    first, name = models[0], options.dataset
    device = pick_device(options.device)
    listing = listing_of(options, first.options.pool)
    classes = tuple(first.about["classes"])
    unknown = sorted(set(listing.classes) - set(classes))
    if unknown:
        raise InputError(f"{name} has the classes {listed(unknown)}, which the models have not")
    for model in models:
        seen = set(map(tuple, model.about["seen"]))
        for utterance, known in zip(listing.utterances, listing.prints):
            if known in seen:
                raise InputError(f"{utterance.path}: {model.folder} has seen it; expected new ones")
    first.options.cache, first.options.skip_bad = options.cache, options.skip_bad
    data = data_of(first.options, listing, classes, device)
    usable = [i for i in range(len(data.labels)) if i not in data.bad]
    results, file = [], f"{name}-{listing.digest[:8]}/predictions.csv"
    for model in models:
        data.standardise_by(known=model.mean_std)
        (model.folder / file).parent.mkdir(exist_ok=True)
        tested = score(model.net.to(device), data, usable, model.options, model.folder, file)
        model.options.dataset, model.options.poison = name, 0.0
        about = {"notes": notes_of(model.options, classes, data.bad), "tests": {name: tested}}
        about |= {"validation": [], "validation_ua": None, "folder": model.folder}
        results.append(model.about | about)
    for (model, seed), own in by_run(results, []).items():
        print(f"\n{model}, seed {seed}", table(own, name), *own[0]["notes"], sep="\n")
    runs = by_run(results, sorted({result["fold"] for result in results}))
    if len(runs) > 1:
        print(f"\n{comparison(runs)[1]}")
    print(f"predictions are beside each model, in {file}")

def main(argv=None):
    if sys.stdout is None or sys.stdout.closed:
        sys.stdout = open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # what it has no letter for
    try:
        command(parse(argv))
        return 0
    except KeyboardInterrupt:
        print("\nstopped; a run goes on from its last checkpoint", file=sys.stderr)
        return 130
    except (InputError, OSError, MemoryError, RuntimeError) as error:
        said = str(error) or "out of memory"  # as a MemoryError may be
        if "out of memory" in said or "allocate memory" in said:
            said += "; --relaxation sample, smaller --batch, --channels and --nodes take less"
        elif isinstance(error, RuntimeError):
            raise
        print(f"error: {said}", file=sys.stderr, flush=True)
        if isinstance(error, BrokenPipeError):  # Python would try it once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2

if __name__ == "__main__":
    sys.exit(main())
