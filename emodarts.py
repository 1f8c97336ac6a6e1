"""emoDARTS: joint differentiable architecture search of a CNN and a sequential network (SeqNN)
for speech emotion recognition, in one file that needs torch alone. The method, on noise:

    import torch
    from torch.nn.functional import cross_entropy
    from emodarts import Architect, Network, derive
    x, y = torch.randn(32, 1, 40, 32), torch.arange(32) % 4  # MFCC maps (N, 1, F, T) and classes: put yours here
    sizes = dict(classes=4, bands=40, channels=4, cnn_cells=3, seq_cells=1, nodes=2, stem_stride=2)
    net = Network(**sizes)  # the supernet: every edge mixes all operations
    architect, optimizer = Architect(net, cross_entropy), torch.optim.SGD(net.weights(), lr=0.025)
    for step in range(3):
        architect.step((x[16:], y[16:]))  # the alphas move on one half of the training data
        optimizer.zero_grad()
        cross_entropy(net(x[:16]), y[:16]).backward()  # the weights on the other half
        optimizer.step()
    net = Network(**sizes, genotype=derive(net))  # the derived network, to be trained from scratch

The problem is bi-level: find the alphas (which operation stands on which edge) that are best on validation
data when the weights w are those that are best on training data *for these alphas*:

    alpha* = argmin_alpha L_val(w*(alpha), alpha)     s.t.     w*(alpha) = argmin_w L_train(w, alpha)

Read on in this order: operations, MixedOp (a choice made continuous), Cell (a graph of mixed operations), Genotype
(the choice made discrete again), Network (cells from MFCC map to logits), derive, Architect (the hypergradient).
Shapes: a map is (N, C, F, T) = batch, channels, feature axis, time axis; a sequence is (N, T, D) = batch, time, width.

[P]  Rajapakshe et al., "emoDARTS: Joint Optimisation of CNN & Sequential Neural Network Architectures for Superior
     Speech Emotion Recognition", IEEE Access 12, 2024 (arXiv 2403.14083)
[D]  Liu, Simonyan, Yang, "DARTS: Differentiable Architecture Search", ICLR 2019 (arXiv 1806.09055)
[G]  Dong, Yang, "Searching for a Robust Neural Architecture in Four GPU Hours", CVPR 2019 (arXiv 1910.04465)
"""

import json
import math
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# CNN operations: (N, C, F, T) -> (N, C, ceil(F / stride), ceil(T / stride)). All paths through a cell must agree in
# size, for odd sizes too, hence "ceil" everywhere. `affine`: whether batch norm (BN) learns a scale and a shift. While
# searching it does not: a learned scale would undo what alpha says about the operation.


class Zero(nn.Module):
    """`none`: no connection."""
    def forward(self, x):
        return torch.zeros_like(x)


def relu_conv_bn(c, kernel, stride, dilation, affine):
    """ReLU, depthwise kernel x kernel, pointwise 1x1, BN."""
    depthwise = nn.Conv2d(c, c, kernel, stride, dilation * (kernel // 2), dilation, groups=c, bias=False)
    return nn.Sequential(nn.ReLU(), depthwise, nn.Conv2d(c, c, 1, bias=False), nn.BatchNorm2d(c, affine=affine))


def sep_conv(c, stride, affine, *, kernel):
    return nn.Sequential(*relu_conv_bn(c, kernel, stride, 1, affine), *relu_conv_bn(c, kernel, 1, 1, affine))


def dil_conv(c, stride, affine, *, kernel):
    if stride == 1:
        return relu_conv_bn(c, kernel, 1, 2, affine)
    # Only the even grid is looked at, and avg_pool2d(x, 1, 2) is x[:, :, ::2, ::2] with a gradient that stays
    # channels_last: the same numbers, several times faster on CPU.
    return nn.Sequential(nn.AvgPool2d(1, 2), *relu_conv_bn(c, kernel, 1, 1, affine))


def pool(c, stride, affine, *, layer):
    return nn.Sequential(layer(3, stride, padding=1), nn.BatchNorm2d(c, affine=affine))


def factorized_reduce(c_in, c_out, affine):
    """`skip_connect` with stride 2: (N, C_in, F, T) -> (N, C_out, ceil(F / 2), ceil(T / 2)), C_out even. Half of the
    output channels look at the even grid, half at the odd one. The grids come first: a 1x1 convolution with stride 2 is
    the same, and corrupts memory on CPU with channels_last (torch 2.11)."""
    convolution = nn.Conv2d(2 * c_in, c_out, 1, groups=2, bias=False)
    return nn.Sequential(nn.ReLU(), BothGrids(), convolution, nn.BatchNorm2d(c_out, affine=affine))


def conv_1x1(c_in, c_out, affine):
    """Brings an input of a cell to the cell's channels: (N, C_in, F, T) -> (N, C_out, F, T)."""
    return nn.Sequential(nn.ReLU(), nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out, affine=affine))


class BothGrids(nn.Module):
    """(N, C, F, T) -> (N, 2C, ceil(F / 2), ceil(T / 2)): the even grid, and behind it the one between its points."""
    def forward(self, x):
        between = F.pad(x, (-1, x.shape[3] % 2, -1, x.shape[2] % 2))  # from 1 on; odd sizes: ceil(size / 2)
        return torch.cat([F.avg_pool2d(x, 1, 2), F.avg_pool2d(between, 1, 2)], dim=1)


# name -> constructor(channels, stride, affine)
CNN_OPS = {
    "none": lambda c, stride, affine: nn.Sequential(nn.AvgPool2d(1, stride), Zero()),
    "max_pool_3x3": partial(pool, layer=nn.MaxPool2d),
    "avg_pool_3x3": partial(pool, layer=partial(nn.AvgPool2d, count_include_pad=False)),
    "skip_connect": lambda c, stride, affine: nn.Identity() if stride == 1 else factorized_reduce(c, c, affine),
    "sep_conv_3x3": partial(sep_conv, kernel=3),
    "sep_conv_5x5": partial(sep_conv, kernel=5),
    "dil_conv_3x3": partial(dil_conv, kernel=3),
    "dil_conv_5x5": partial(dil_conv, kernel=5),
}

# SeqNN operations: (N, T, D) -> (N, T, D). The recurrence runs over time, within an utterance; never over the batch.
# All end in a layer norm, as CNN operations end in BN, and start with weights that keep a signal's size at any depth:
# otherwise lstm_4 begins at a hundredth of what a skip adds, and alpha measures how loud an operation is.


class Recurrent(nn.Module):
    """`lstm_k`, `rnn_k`: k stacked layers, one direction. Gate by gate, input weights start as Xavier's, recurrent ones
    orthogonal; the forget gate's bias is 1, others are 0."""
    def __init__(self, width, affine, *, layer, layers, bidirectional=False):
        super().__init__()
        self.rnn = layer(width, width, layers, batch_first=True, bidirectional=bidirectional)
        self.norm = nn.LayerNorm(width, elementwise_affine=affine)
        for name, p in self.rnn.named_parameters():
            for k, gate in enumerate(p.detach().split(width)):  # of an LSTM: input, forget, cell, output
                if "weight_ih" in name:
                    nn.init.xavier_uniform_(gate)
                elif "weight_hh" in name:
                    nn.init.orthogonal_(gate)
                else:
                    nn.init.constant_(gate, float(layer is nn.LSTM and "bias_ih" in name and k == 1))

    def forward(self, x):
        return self.norm(self.rnn(x)[0])


class RecurrentAttention(Recurrent):
    """`lstm_att_k`, `rnn_att_k`: k stacked bidirectional layers, then additive attention over time. With h_t the output
    at frame t and q the last output of both directions (each 2D wide):
        a = softmax over t of  v . tanh(W [h_t, q]),      context = sum_t a_t h_t,      y_t = P [h_t, context]"""
    def __init__(self, width, affine, *, layer, layers):
        super().__init__(width, affine, layer=layer, layers=layers, bidirectional=True)
        self.score = nn.Sequential(nn.Linear(4 * width, width), nn.Tanh(), nn.Linear(width, 1, bias=False))
        self.project = nn.Linear(4 * width, width)

    def forward(self, x):  # (N, T, D)
        h, _ = self.rnn(x)  # (N, T, 2D): the forward half ends with the last frame, the backward half with the first
        forward, backward = h.chunk(2, dim=2)
        q = torch.cat([forward[:, -1:], backward[:, :1]], dim=2).expand_as(h)  # (N, 1, 2D) -> (N, T, 2D)
        a = self.score(torch.cat([h, q], dim=2)).softmax(dim=1)  # (N, T, 1), sums to 1 over T
        context = (a * h).sum(dim=1, keepdim=True).expand_as(h)  # (N, 1, 2D) -> (N, T, 2D)
        return self.norm(self.project(torch.cat([h, context], dim=2)))  # (N, T, 4D) -> (N, T, D)


# name -> constructor(width, affine)
SEQ_OPS = {
    "none": lambda width, affine: Zero(),
    "skip_connect": lambda width, affine: nn.Identity(),
    **{f"lstm_{k}": partial(Recurrent, layer=nn.LSTM, layers=k) for k in (1, 2, 3, 4)},
    **{f"rnn_{k}": partial(Recurrent, layer=nn.RNN, layers=k) for k in (1, 2, 3, 4)},
    **{f"lstm_att_{k}": partial(RecurrentAttention, layer=nn.LSTM, layers=k) for k in (1, 2)},
    **{f"rnn_att_{k}": partial(RecurrentAttention, layer=nn.RNN, layers=k) for k in (1, 2)},
}

# The paper's restricted spaces: one family of operations each, plus `none` and `skip_connect`.
SEQ_SPACES = {"all": tuple(SEQ_OPS)}
for _family, _depths in {"lstm": 4, "rnn": 4, "lstm_att": 2, "rnn_att": 2}.items():
    SEQ_SPACES[_family] = ("none", "skip_connect", *(f"{_family}_{k + 1}" for k in range(_depths)))

RELAXATIONS = ("softmax", "sample")


class MixedOp(nn.Module):
    """An edge that is not yet decided: every candidate operation, weighted by the softmax of its alpha [D eq. 2],
        o_bar(x) = sum_o softmax(alpha)_o * o(x)
    `ops`: name -> module. `weight`: softmax(alpha), (operations,); a decided edge has one operation and no weight.
    `drawn`: the number of the only operation to compute, see `Network.relaxed`. ValueError where shapes differ."""
    def __init__(self, ops):
        super().__init__()
        self.ops = nn.ModuleDict(ops)

    def forward(self, x, weight=None, drawn=None):
        ops = list(self.ops.values())
        if len(ops) != (1 if weight is None else len(weight)):
            raise ValueError(f"expected a weight for each of {', '.join(self.ops)}, found {weight}")
        if weight is None:
            return ops[0](x)
        if drawn is not None:
            return weight[drawn] * ops[drawn](x)
        # `none` adds nothing; its alpha still counts, as it takes its share of the softmax.
        (w, first, op), *others = [item for item in zip(weight, self.ops, ops) if item[1] != "none"]
        y = w * op(x)
        for w, name, op in others:
            out = op(x)
            if out.shape != y.shape:
                raise ValueError(f"operations return different shapes: {first} {[*y.shape]}, {name} {[*out.shape]}")
            y.addcmul_(w, out)  # y + w * out without a copy of y
        return y


class Cell(nn.Module):
    """A directed acyclic graph. States 0 and 1 are the outputs of the two cells before, state i >= 2 (a node) is the
    sum of its incoming edges, s_i = sum_{j < i} edge_ji(s_j), and the output is the concatenation of the nodes.

    `wiring`: for each node the list of its edges (j, names of the candidate operations): many names before the search
    has decided, one after; the cell does not care which. `make(name, j)` builds an operation for an edge that starts at
    state j. `before`: modules that the inputs pass first. `concat`: the axis of C in (N, C, F, T). Edge and operation
    keep their names in `state_dict`, so a derived cell's keys are among the supernet's."""
    def __init__(self, kind, wiring, make, before=(), edge=MixedOp, concat=1):
        super().__init__()
        self.kind, self.concat = kind, concat
        self.before = nn.ModuleList(before or [nn.Identity(), nn.Identity()])
        self.edges = nn.ModuleDict()
        self.incoming = [[] for _ in wiring]  # of each node: its edges, as (row of the weights, j)
        for i, node in enumerate(wiring, start=2):
            for j, names in node:
                self.incoming[i - 2].append((len(self.edges), j))
                self.edges[f"{j}_{i}"] = edge({name: make(name, j) for name in names})

    def forward(self, s0, s1, weight=None, drawn=None, p_drop=0.0):
        """`weight`: alpha.softmax(-1), (edges, operations), in the order of `wiring`; None if decided. `drawn`: for
        each edge a number, see `MixedOp`. `p_drop`: the share of utterances for which a decided edge is dropped in
        training (drop-path). Raises ValueError for rows or shapes that do not fit."""
        weights = [None] * len(self.edges) if weight is None else list(weight)
        drawn = drawn or [None] * len(weights)
        if len(weights) != len(self.edges):
            raise ValueError(f"{self.kind} cell: {len(weights)} rows of weights for {len(self.edges)} edges")
        states = [self.before[0](s0), self.before[1](s1)]
        for i, node in enumerate(self.incoming, start=2):
            arrived = []
            for row, j in node:
                edge = self.edges[f"{j}_{i}"]
                y = edge(states[j], weights[row], drawn[row])
                if p_drop > 0 and self.training and weight is None and "skip_connect" not in edge.ops:
                    y = drop_path(y, p_drop)  # never of a skip, which keeps the path alive
                arrived.append(y)
            if any(y.shape != arrived[0].shape for y in arrived):
                found = []
                for (row, j), y in zip(node, arrived):
                    ops, k = list(self.edges[f"{j}_{i}"].ops), drawn[row]
                    found.append(f"{ops if k is None else ops[k]} {[*y.shape]}")
                raise ValueError(f"{self.kind} cell, node {i}: edges return different shapes: {', '.join(found)}")
            states.append(sum(arrived[1:], start=arrived[0]))
        return torch.cat(states[2:], dim=self.concat)


def drop_path(x, p):
    """Zeroes an edge's output for a random share `p` of the utterances, and scales the others by 1 / (1 - p)."""
    return x * F.dropout(x.new_ones(len(x), *[1] * (x.dim() - 1)), p)


class CNNCell(Cell):
    """(N, c0, F0, T0), (N, c1, F, T) -> (N, nodes * c, F, T). A reduction cell (`kind` "reduce") has stride 2 on the
    edges that leave its two inputs: its nodes are (N, c, ceil(F / 2), ceil(T / 2)). After a reduction cell the older
    input is still twice as large (`halve_s0`) and is halved on the way in."""
    def __init__(self, kind, wiring, c0, c1, c, halve_s0, affine, edge=MixedOp):
        def make(name, j):
            return CNN_OPS[name](c, 2 if kind == "reduce" and j < 2 else 1, affine)

        before = factorized_reduce if halve_s0 else conv_1x1
        super().__init__(kind, wiring, make, [before(c0, c, affine), conv_1x1(c1, c, affine)], edge)


class SeqCell(Cell):
    """(N, T, D), (N, T, D) -> (N, T, D). Adaptive average pooling brings the nodes * D features back to D."""
    def __init__(self, wiring, width, affine, edge=MixedOp):
        super().__init__("seq", wiring, lambda name, j: SEQ_OPS[name](width, affine), edge=edge, concat=2)
        self.width = width

    def forward(self, *args):
        return F.adaptive_avg_pool1d(super().forward(*args), self.width)  # (N, T, nodes * D) -> (N, T, D)


class RecomputedOp(MixedOp):
    """A MixedOp that keeps its input only, and computes its operations again on the way back: less memory, more time,
    the same bits. The second time BN leaves its statistics alone: a batch counts once."""
    def forward(self, *args):
        contexts = nullcontext(), without_statistics(self)
        return checkpoint(super().forward, *args, use_reentrant=False, context_fn=lambda: contexts)


class without_statistics:
    """Inside, batch norm in training mode normalises by the batch as always, but its statistics go into copies. Knows
    the norms that `net` has when it is built, and may be entered again and again."""
    def __init__(self, net):
        self.norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
        self.kept = []

    def __enter__(self):
        self.kept.append([m._buffers for m in self.norms])
        for m in self.norms:  # copies, as a momentum of 0 would still make NaN of the statistics where a batch has it
            m._buffers = {name: b if b is None else b.clone() for name, b in m._buffers.items()}

    def __exit__(self, *error):
        for m, buffers in zip(self.norms, self.kept.pop()):
            m._buffers = buffers


@dataclass(frozen=True)
class Genotype:
    """What a search has found: a graph for all normal CNN cells, one for all reduction cells, one for all SeqNN cells;
    None for a kind that the network's depth does not use. A cell is a tuple of nodes, a node a tuple of edges, an edge
    a pair (operation, predecessor); predecessors 0 and 1 are the cell's inputs, 2 its first node. Else ValueError."""
    normal: tuple = None
    reduce: tuple = None
    seq: tuple = None

    def __post_init__(self):
        for kind, cell in self.cells().items():
            object.__setattr__(self, kind, checked_cell(kind, cell))  # lists, as JSON has them, become tuples

    def cells(self):
        """{kind: cell} of the cells that are there."""
        return {kind: cell for kind, cell in vars(self).items() if cell is not None}

    def to_json(self):
        return "{\n  " + ",\n  ".join(f'"{kind}": {json.dumps(cell)}' for kind, cell in self.cells().items()) + "\n}\n"

    @classmethod
    def from_json(cls, text):
        try:
            return cls(**json.loads(text))
        except (TypeError, RecursionError, json.JSONDecodeError) as error:
            raise ValueError(f"genotype: expected a JSON object with the cells normal, reduce, seq ({error})") from None

    def __str__(self):
        lines = []
        for kind, cell in self.cells().items():
            lines.append(f"{kind} cell (0, 1: the outputs of the two cells before)")
            lines += [f"  {i} = " + " + ".join(f"{op}({j})" for op, j in node) for i, node in enumerate(cell, start=2)]
            lines.append(f"  output = {list(range(2, len(cell) + 2))}")
        return "\n".join(lines)


def checked_cell(kind, cell):
    """A cell of a genotype as tuples; ValueError for what is none."""
    known, nodes = SEQ_OPS if kind == "seq" else CNN_OPS, ()
    with suppress(TypeError, ValueError):
        nodes = tuple(tuple((op, j) for op, j in node) for node in cell)
    if not nodes or not all(nodes):
        raise ValueError(f"genotype, {kind} cell: expected a list of nodes, each a list of edges [operation, "
                         f"predecessor], at least one of each, found {cell!r:.80}")
    for i, node in enumerate(nodes, start=2):
        where = f"genotype, {kind} cell, node {i}"
        for op, j in node:
            if not isinstance(op, str) or op not in known:
                raise ValueError(f"{where}: unknown operation {op!r:.80}; known: {', '.join(known)}")
            if type(j) is not int or not 0 <= j < i:
                raise ValueError(f"{where}: no predecessor {j!r:.80}; known: {', '.join(map(str, range(i)))}")
        if len({j for _, j in node}) < len(node):
            raise ValueError(f"{where}: the same predecessor stands twice; each of its edges needs its own")
    return nodes


class Frames(nn.Module):
    """(N, C, F, T) -> (N, T, D), what the SeqNN reads of each frame: the mean over F, D = C, as in the paper; with a
    `width` all of its C x F features through a linear layer, D = width, LayerNorm and dropout. T stays."""
    def __init__(self, c, f, width=None, dropout=0.3):
        super().__init__()
        layers = [nn.Linear(c * f, width), nn.LayerNorm(width), nn.Dropout(dropout)] if width else []
        self.project = nn.Sequential(*layers)

    def forward(self, x):
        x = x.flatten(1, 2) if len(self.project) else x.mean(dim=2)  # (N, C, F, T) -> (N, C F, T) or (N, C, T)
        return self.project(x.transpose(1, 2))  # (N, T, C F) -> (N, T, D), or (N, T, C) as it is


class Network(nn.Module):
    """MFCC map -> CNN cells -> SeqNN cells -> logits. Without `genotype` the supernet (every edge is a mixed operation,
    and there are alphas), with one the derived network (every edge is the operation that was found, no alphas).

    classes      number of emotions
    bands        F of the maps
    channels     channels of the first CNN cell; each of the (at most two) reduction cells doubles them
    cnn_cells    at least 1; reduction cells stand at 1/3 and 2/3 of the depth
    seq_cells    0 gives the CNN-only search of 2023
    nodes        nodes a cell, of the supernet; a genotype brings its own
    stem_stride  2 halves the input map before the first cell
    seq_width    D of the SeqNN, to which `Frames` projects; None, the paper's, is the mean over F
    seq_space    candidate operations of the SeqNN, a key of SEQ_SPACES; of the supernet
    relaxation   "softmax" or "sample", see `relaxed`; of the supernet
    dropout      after each cell (the authors: 0.3, with which few data are not learnt); `Frames` has its own
    recompute    edges are computed again on the way back, see `RecomputedOp`
    amp          mixed precision: bfloat16 where torch.autocast says so; weights, alphas and logits stay float32
    fixed        a Genotype of the cells that the search leaves as they are; of the supernet

    The defaults are the paper's scale. Raises ValueError for sizes that cannot be, and for a genotype without a cell
    that these sizes need. Its attribute `drop_path` is the share of edges dropped in training (0 at first)."""
    def __init__(self, *, classes=4, bands=128, channels=8, cnn_cells=4, seq_cells=4, nodes=4, stem_stride=1,
                 seq_width=None, seq_space="all", relaxation="softmax", dropout=0.0, recompute=False, amp=False,
                 fixed=None, genotype=None):
        super().__init__()
        sizes = dict(classes=classes, bands=bands, channels=channels, cnn_cells=cnn_cells, seq_cells=seq_cells,
                     nodes=nodes, stem_stride=stem_stride, seq_width=seq_width or 1)
        for name, size in sizes.items():
            if size < (name != "seq_cells"):
                raise ValueError(f"{name} is {size}, expected at least {int(name != 'seq_cells')}")
        for name, value, known in (("seq_space", seq_space, SEQ_SPACES), ("relaxation", relaxation, RELAXATIONS)):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")
        self.relaxation, self.amp, self.nodes, self.drop_path, self.decision = relaxation, amp, nodes, 0.0, {}
        self.dropout = nn.Dropout(dropout)
        reductions = {cnn_cells // 3, 2 * cnn_cells // 3}
        kinds = ["reduce" if k in reductions else "normal" for k in range(cnn_cells)] + ["seq"] * seq_cells
        wiring = self.wire(kinds, genotype, fixed or Genotype(), seq_space)
        affine, edge = genotype is not None, RecomputedOp if recompute else MixedOp
        c, f = channels, -(-bands // stem_stride)
        before = [(3 * c, f), (3 * c, f)]  # channels and F of the two outputs before
        self.stem = nn.Sequential(nn.Conv2d(1, 3 * c, 3, stem_stride, padding=1, bias=False), nn.BatchNorm2d(3 * c))
        self.cnn = nn.ModuleList()
        for k, kind in enumerate(kinds[:cnn_cells]):
            if kind == "reduce":
                c, f = 2 * c, -(-f // 2)
            halve_s0 = k > 0 and kinds[k - 1] == "reduce"
            self.cnn.append(CNNCell(kind, wiring[kind], before[0][0], before[1][0], c, halve_s0, affine, edge))
            before = [before[1], (len(wiring[kind]) * c, f)]
        width = seq_width or before[1][0]
        read = before if seq_cells else before[1:]  # a network without SeqNN cells has no use for the older output
        self.bridge = nn.ModuleList(Frames(*size, seq_width) for size in read)
        self.seq = nn.ModuleList(SeqCell(wiring["seq"], width, affine, edge) for _ in range(seq_cells))
        self.head = nn.Linear(width, classes)

    def wire(self, kinds, genotype, fixed, seq_space):
        """-> the wiring of each kind of cell, see `Cell`. Makes the alphas of those that are to be searched."""
        self.fixed = (genotype or fixed).cells()  # cells that are decided
        self.candidates = {}  # of the others, the operations to choose from
        self.alpha = nn.ParameterDict()  # one for all cells of a kind, (edges, operations), nearly uniform at first
        wiring = {kind: [[(j, (op,)) for op, j in node] for node in cell] for kind, cell in self.fixed.items()}
        for kind in ("normal", "reduce", "seq"):
            if kind in kinds and kind not in self.fixed:
                names = self.candidates[kind] = SEQ_SPACES[seq_space] if kind == "seq" else tuple(CNN_OPS)
                wiring[kind] = [[(j, names) for j in range(i)] for i in range(2, self.nodes + 2)]
                self.alpha[kind] = nn.Parameter(1e-3 * torch.randn(sum(map(len, wiring[kind])), len(names)))
        if genotype is not None and self.candidates:
            raise ValueError(f"the genotype has no {' and no '.join(self.candidates)} cell, which this depth needs; "
                             f"it has: {', '.join(self.fixed) or 'none'}")
        return wiring

    def weights(self):
        """The parameters w of the lower level: all but the alphas."""
        return [p for name, p in self.named_parameters() if not name.startswith("alpha.")]

    def alphas(self):
        """The parameters of the upper level; empty for a derived network."""
        return list(self.alpha.values())

    def forward(self, x):
        """(N, 1, F, T) -> logits (N, classes)."""
        if not self.amp:
            return self.classify(*self.frames(x))
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.classify(*self.frames(x)).float()

    def relaxed(self, kind):
        """The choice on each edge, made continuous: -> (weights, drawn), for each edge what `MixedOp` takes.

        softmax  softmax(alpha), and all operations are computed [D eq. 2]
        sample   in training: one operation is drawn from the softmax and computed alone [G eq. 3, straight-through
                 Gumbel]. With g_o = -log(-log u_o), u uniform, and p = softmax(alpha + g), it is k = argmax p, which is
                 o with probability softmax(alpha)_o; its weight is 1 going forward and p_k on the way back"""
        if kind not in self.alpha:
            return None, None
        if kind in self.decision:
            return list(self.decision[kind]), self.decision[kind].argmax(dim=-1).tolist()
        alpha = self.alpha[kind]
        if self.relaxation == "softmax" or not self.training:
            return list(alpha.softmax(dim=-1)), None
        gumbel = -torch.empty(alpha.shape, device="cpu").exponential_().log()  # drawn on the CPU for any device
        p = (alpha + gumbel.to(alpha)).softmax(dim=-1)
        drawn = p.argmax(dim=-1)
        return list(F.one_hot(drawn, p.shape[-1]) - p.detach() + p), drawn.tolist()

    def through(self, cells, s0, s1):
        """(output of the cell before last, output of the last cell) before these cells -> the same behind them."""
        choices = {kind: self.relaxed(kind) for kind in dict.fromkeys(cell.kind for cell in cells)}
        for cell in cells:
            s0, s1 = s1, self.dropout(cell(s0, s1, *choices[cell.kind], self.drop_path))
        return s0, s1

    def frames(self, x):
        """The CNN half: (N, 1, F, T) -> its last two outputs as sequences in time, each (N, T', D)."""
        x = self.stem(x)  # (N, 3 channels, F, T)
        s0, s1 = self.through(self.cnn, x, x)
        s1 = self.bridge[-1](s1)
        s0 = self.bridge[0](s0) if len(self.seq) else s1
        if s0.shape != s1.shape:  # the older output may be longer, or at depths other than 4 narrower
            s0 = F.adaptive_avg_pool2d(s0, s1.shape[1:])
        return s0, s1

    def classify(self, s0, s1):
        """The SeqNN half: (N, T, D), (N, T, D) -> logits (N, classes)."""
        _, s1 = self.through(self.seq, s0, s1)
        return self.head(s1.mean(dim=1))  # (N, T, D) -> (N, D) -> (N, classes)


def derive(net):
    """Supernet -> Genotype [D section 2.4], by softmax weights: a raw alpha says nothing about its share among the
    others on its edge. Raises ValueError for alphas that are not finite."""
    return strongest(net, {kind: alpha.detach().softmax(dim=-1) for kind, alpha in net.alpha.items()})


def random_genotype(net):
    """The strongest of random weights: what a search has to beat. Uniform over a supernet's space."""
    return strongest(net, {kind: torch.rand(alpha.shape, device="cpu") for kind, alpha in net.alpha.items()})


def strongest(net, weights):
    """The strength of an edge is its largest weight over the operations other than `none`; each node keeps its two
    strongest edges, each with its strongest operation. `weights`: kind -> (edges, operations). -> Genotype"""
    cells = dict(net.fixed)
    for kind, names in net.candidates.items():
        if weights[kind].isnan().any():
            raise ValueError(f"the alphas of the {kind} cell are not finite: no edge is the strongest")
        kept = [k for k, name in enumerate(names) if name != "none"]
        strength, operation = weights[kind].cpu()[:, kept].max(dim=-1)
        nodes, row = [], 0
        for i in range(2, net.nodes + 2):  # node i: rows of its edges from 0 to i - 1
            pair = strength[row : row + i].topk(2).indices.sort().values.tolist()
            nodes.append([(names[kept[operation[row + j]]], j) for j in pair])
            row += i
        cells[kind] = nodes
    return Genotype(**cells)


@contextmanager
def decided(net, genotype):
    """Inside, a supernet computes with its own weights what the derived network would. Raises ValueError for a genotype
    that is not in its space."""
    before, decision = net.decision, {}  # like the softmax weights, 1 for an operation that the genotype has
    for kind, names in net.candidates.items():
        cell = genotype.cells().get(kind, ())
        chosen = {(i, j): op for i, node in enumerate(cell, start=2) for op, j in node}
        edges = [(i, j) for i in range(2, net.nodes + 2) for j in range(i)]
        if len(cell) != net.nodes or not set(chosen.values()) <= set(names):
            raise ValueError(f"{kind} cell: expected {net.nodes} nodes of {', '.join(names)}, the genotype has {cell}")
        one_hot = torch.tensor([[chosen.get(edge) == name for name in names] for edge in edges])
        decision[kind] = one_hot.to(net.alpha[kind])
    net.decision = decision
    try:
        yield
    finally:
        net.decision = before


def expected_parameters(net):
    """Number of weights on a supernet's edges, each operation counted with its softmax(alpha): differentiable, ()."""
    total = 0.0
    for cell in (cell for cell in (*net.cnn, *net.seq) if cell.kind in net.alpha):
        weight, edges = net.alpha[cell.kind].softmax(dim=-1), cell.edges.values()
        sizes = [[sum(map(torch.numel, op.parameters())) for op in edge.ops.values()] for edge in edges]
        total = total + (weight * torch.tensor(sizes).to(weight)).sum()
    return total


def entropy(net):
    """Mean entropy of the edges' softmax weights as a share of the largest possible: 1 undecided, 0 decided."""
    weights = [alpha.detach().softmax(dim=-1) for alpha in net.alphas()]
    shares = [torch.special.entr(p).sum(dim=-1) / math.log(p.shape[-1]) for p in weights]  # entr: 0 where p is 0
    return torch.cat(shares).mean().item()


class Architect:
    """Moves the alphas of a supernet along the hypergradient, i.e. the gradient of L_val(w*(alpha), alpha), where w*
    is approximated by one step of plain gradient descent, w' = w - xi * dL_train/dw [D eq. 6-8]:
        dL_val(w')/dalpha - xi * (dL_train(w+)/dalpha - dL_train(w-)/dalpha) / (2 eps)
        w+- = w +- eps * dL_val/dw',     eps = 0.01 / ||dL_val/dw'||
    order=1 sets xi = 0: one pass over the validation batch, and neither a copy nor a gradient of the weights.
    order=2 takes four passes; while it lasts it holds one copy of the weights and one gradient.
    `loss(logits, target)` -> scalar. A batch is a pair (x, target). Weights and BN buffers are bit for bit the same
    after a step as before. `penalty()` -> scalar, a function of the alphas alone that is added to L_val. A weight or
    alpha that does not require a gradient is a constant."""
    def __init__(self, net, loss, *, order=1, lr=3e-4, betas=(0.5, 0.999), weight_decay=1e-3, penalty=None):
        if order not in (1, 2):
            raise ValueError(f"order is {order!r}, expected 1 or 2")
        if order == 2 and net.relaxation == "sample":
            raise ValueError("order 2 goes with relaxation softmax: each of its passes would draw another network")
        if not net.alphas():
            raise ValueError("the network has no alphas: expected a supernet that has cells to search")
        self.net, self.loss, self.order, self.penalty = net, loss, order, penalty
        self.weights, self.without_statistics = net.weights(), without_statistics(net)
        self.optimizer = torch.optim.Adam(net.alphas(), lr=lr, betas=betas, weight_decay=weight_decay)

    def step(self, val, train=None, xi=None):
        """Moves the alphas once; returns L_val (of w, or of w' when order=2), a float. `val` comes from the half of the
        training data that is kept for the alphas. Order 2 also needs `train`, the batch of the coming weight step, and
        `xi`, that step's learning rate. Raises ValueError for a loss or gradient that is not finite, before anything
        has moved."""
        if self.order == 2 and (train is None or xi is None):
            raise ValueError("order 2 needs `train`, the batch of the coming weight step, and `xi`, its learning rate")
        loss, gradients = self.first_order(val) if self.order == 1 else self.second_order(val, train, xi)
        alphas = free(self.net.alphas())
        if self.penalty and alphas:
            more = torch.autograd.grad(self.penalty(), alphas, materialize_grads=True)
            gradients = [g + m for g, m in zip(gradients, more)]
        if not torch.cat([loss.reshape(1), *(g.flatten() for g in gradients)]).isfinite().all():
            raise ValueError(f"the loss of the alphas, {loss.item():.3g}, or its gradient is not finite")
        self.optimizer.zero_grad()  # of the caller's weight step
        for alpha, g in zip(alphas, gradients):
            alpha.grad = g
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def first_order(self, val):
        """dL_val(w, alpha)/dalpha, w held fixed. -> L_val, a gradient for each alpha."""
        with self.without_statistics, held_fixed(self.weights):
            return self.gradient(val, free(self.net.alphas()))

    def second_order(self, val, train, xi):
        """[D eq. 7], with the finite difference of [D eq. 8]. -> L_val(w'), a gradient for each alpha."""
        w, alphas = free(self.weights), free(self.net.alphas())
        w_before = [p.detach().clone() for p in w]
        # The three passes over the training batch must be the same function of (w, alpha): with fresh dropout masks
        # the difference of the last two would be that of the masks, blown up by 1 / (2 eps).
        masks = int(torch.randint(2**62, ()))
        with self.without_statistics:
            try:
                set_to(w, w_before, self.gradient(train, w, masks)[1], -xi)  # w'
                loss, both = self.gradient(val, alphas + w)
                d_alpha, d_w = both[: len(alphas)], both[len(alphas) :]
                eps = 0.01 / max(torch.nn.utils.get_total_norm(d_w).item(), 1e-12)  # zeros have no second-order term
                set_to(w, w_before, d_w, eps)  # w+
                _, plus = self.gradient(train, alphas, masks)
                set_to(w, w_before, d_w, -eps)  # w-
                _, minus = self.gradient(train, alphas, masks)
            finally:
                set_to(w, w_before)
        return loss, [d - xi * (p - m) / (2 * eps) for d, p, m in zip(d_alpha, plus, minus)]

    def gradient(self, batch, parameters, masks=None):
        """Loss of a batch and its gradients. `masks`: seed of the dropout masks; without one they are drawn afresh."""
        x, target = batch
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else [], enabled=masks is not None):
            if masks is not None:
                torch.manual_seed(masks)
            loss = self.loss(self.net(x), target)
        found = torch.autograd.grad(loss, parameters, materialize_grads=True) if parameters else ()
        return loss.detach(), found  # zeros for what a drawn `none` cuts off


def free(parameters):
    """Those that the caller has not made constants."""
    return [p for p in parameters if p.requires_grad]


@contextmanager
def held_fixed(parameters):
    """Inside, these are constants: autograd computes no gradient of theirs, and keeps nothing on their behalf."""
    parameters = free(parameters)
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


@torch.no_grad()
def set_to(w, base, direction=None, step=0.0):
    """w := base + step * direction, in place, parameter by parameter."""
    for k, p in enumerate(w):
        p.copy_(base[k] if direction is None else base[k] + step * direction[k])
