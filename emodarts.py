"""emoDARTS: joint differentiable architecture search of a CNN and a sequential network (SeqNN)
for speech emotion recognition, in one file that needs torch alone. The method, on noise:

    import torch
    from emodarts import Architect, Network, derive
    from torch.nn.functional import cross_entropy
    x, y = torch.randn(32, 1, 40, 32), torch.arange(32) % 4  # maps (N, 1, F, T) and classes
    sizes = dict(classes=4, bands=40, channels=4, cnn_cells=3, seq_cells=1, nodes=2, stem_stride=2)
    net = Network(**sizes)  # the supernet: every edge mixes all operations
    architect, optimizer = Architect(net, cross_entropy), torch.optim.SGD(net.weights(), 0.025)
    for step in range(3):
        architect.step((x[16:], y[16:]))  # the alphas move on one half of the training data
        optimizer.zero_grad()
        cross_entropy(net(x[:16]), y[:16]).backward()  # the weights on the other half
        optimizer.step()
    net = Network(**sizes, genotype=derive(net))  # the derived network, to be trained from scratch

The problem is bi-level: find the alphas (which operation stands on which edge) that are best on
validation data when the weights w are those that are best on training data for these alphas:

    alpha* = argmin_alpha L_val(w*(alpha), alpha)    s.t.    w*(alpha) = argmin_w L_train(w, alpha)

Read on: operations, MixedOp, Cell, Genotype, Network, derive, Architect. Shapes: a map is
(N, C, F, T) = batch, channels, features, time; a sequence (N, T, D) = batch, time, width.

[P] Rajapakshe et al., "emoDARTS", IEEE Access 12, 2024 (arXiv 2403.14083)
[D] Liu, Simonyan, Yang, "DARTS: Differentiable Architecture Search", 2019 (arXiv 1806.09055)
[G] Dong, Yang, "Searching for a Robust Neural Architecture in Four GPU Hours", 2019 (1910.04465)
"""

import json
import math
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

# CNN operations: (N, C, F, T) -> (N, C, ceil(F / stride), ceil(T / stride)). All paths through a
# cell must agree in size, for odd sizes too, hence "ceil" everywhere. `affine`: whether batch norm
# (BN) learns a scale; while searching it would undo what alpha says about the operation.

class Zero(nn.Module):
    """`none`: no connection."""
    def forward(self, x):
        return torch.zeros_like(x)

def relu_conv_bn(c, kernel, stride, dilation, affine):
    """ReLU, depthwise kernel x kernel, pointwise 1x1, BN."""
    padding = dilation * (kernel // 2)
    depthwise = nn.Conv2d(c, c, kernel, stride, padding, dilation, groups=c, bias=False)
    pointwise = nn.Conv2d(c, c, 1, bias=False)
    norm = nn.BatchNorm2d(c, affine=affine)
    return nn.Sequential(nn.ReLU(), depthwise, pointwise, norm)

def sep_conv(c, stride, affine, *, kernel):
    first = relu_conv_bn(c, kernel, stride, 1, affine)
    return nn.Sequential(*first, *relu_conv_bn(c, kernel, 1, 1, affine))

def dil_conv(c, stride, affine, *, kernel):
    if stride == 1:
        return relu_conv_bn(c, kernel, 1, 2, affine)
    # = relu_conv_bn(c, kernel, 2, 2, affine), which looks at the even grid only; several times
    # faster on a CPU: AvgPool2d(1, 2) is x[:, :, ::2, ::2], its gradient stays channels_last.
    return nn.Sequential(nn.AvgPool2d(1, 2), *relu_conv_bn(c, kernel, 1, 1, affine))

def pool(c, stride, affine, *, layer):
    return nn.Sequential(layer(3, stride, padding=1), nn.BatchNorm2d(c, affine=affine))

def conv_1x1(c_in, c_out, affine):
    """(N, C_in, F, T) -> (N, C_out, F, T): brings an input of a cell to the cell's channels."""
    convolution = nn.Conv2d(c_in, c_out, 1, bias=False)
    return nn.Sequential(nn.ReLU(), convolution, nn.BatchNorm2d(c_out, affine=affine))

def factorized_reduce(c_in, c_out, affine):
    """Halves the map; = two Conv2d(c_in, c_out // 2, 1, stride=2), of x and of x[:, :, 1:, 1:].
    On a CPU these corrupt memory with channels_last (torch 2.11): the grids come first."""
    convolution = nn.Conv2d(2 * c_in, c_out, 1, groups=2, bias=False)
    norm = nn.BatchNorm2d(c_out, affine=affine)
    return nn.Sequential(nn.ReLU(), BothGrids(), convolution, norm)

class BothGrids(nn.Module):
    """(N, C, F, T) -> (N, 2C, ceil(F / 2), ceil(T / 2)): the even grid x[:, :, ::2, ::2], behind it
    the odd one x[:, :, 1::2, 1::2], where odd sizes get a last row or column of zeros."""
    def forward(self, x):
        odd = F.pad(x, (-1, x.shape[3] % 2, -1, x.shape[2] % 2))
        return torch.cat([F.avg_pool2d(x, 1, 2), F.avg_pool2d(odd, 1, 2)], dim=1)

# name -> constructor(channels, stride, affine)
CNN_OPS = {
    "none": lambda c, s, a: nn.Sequential(nn.AvgPool2d(1, s), Zero()),
    "max_pool_3x3": partial(pool, layer=nn.MaxPool2d),
    "avg_pool_3x3": partial(pool, layer=partial(nn.AvgPool2d, count_include_pad=False)),
    "skip_connect": lambda c, s, a: factorized_reduce(c, c, a) if s > 1 else nn.Identity(),
    "sep_conv_3x3": partial(sep_conv, kernel=3),
    "sep_conv_5x5": partial(sep_conv, kernel=5),
    "dil_conv_3x3": partial(dil_conv, kernel=3),
    "dil_conv_5x5": partial(dil_conv, kernel=5),
}

# SeqNN operations: (N, T, D) -> (N, T, D). The recurrence runs over time, never over the batch. It
# starts with weights that keep a signal's size at any depth and ends in a layer norm: otherwise
# lstm_4 begins at a hundredth of what a skip adds, and alpha measures how loud an operation is.

class Recurrent(nn.Module):
    """`lstm_k`, `rnn_k`: k stacked layers, one direction. Gate by gate, input weights start as
    Xavier's, recurrent ones orthogonal; the forget gate's bias is 1, others are 0."""
    def __init__(self, width, affine, *, layer, layers, bidirectional=False):
        super().__init__()
        self.rnn = layer(width, width, layers, batch_first=True, bidirectional=bidirectional)
        self.norm = nn.LayerNorm(width, elementwise_affine=affine)
        for name, p in self.rnn.named_parameters():
            for k, gate in enumerate(p.detach().split(width)):
                if "weight_ih" in name:
                    nn.init.xavier_uniform_(gate)
                elif "weight_hh" in name:
                    nn.init.orthogonal_(gate)
                else:  # an LSTM's gates are input, forget, cell and output
                    forget = layer is nn.LSTM and "bias_ih" in name and k == 1
                    nn.init.constant_(gate, float(forget))

    def forward(self, x):
        return self.norm(self.rnn(x)[0])

class RecurrentAttention(Recurrent):
    """`lstm_att_k`, `rnn_att_k`: k stacked bidirectional layers, then additive attention over time.
    With h_t the output at frame t and q the last output of both directions (each 2D wide):
        a = softmax over t of  v . tanh(W [h_t, q]),  c = sum_t a_t h_t,  y_t = P [h_t, c]"""
    def __init__(self, width, affine, *, layer, layers):
        super().__init__(width, affine, layer=layer, layers=layers, bidirectional=True)
        hidden, v = nn.Linear(4 * width, width), nn.Linear(width, 1, bias=False)
        self.score = nn.Sequential(hidden, nn.Tanh(), v)
        self.project = nn.Linear(4 * width, width)

    def forward(self, x):  # (N, T, D)
        h, _ = self.rnn(x)  # (N, T, 2D)
        forward, backward = h.chunk(2, dim=2)  # one ends with the last frame, one with the first
        q = torch.cat([forward[:, -1:], backward[:, :1]], dim=2).expand_as(h)
        a = self.score(torch.cat([h, q], dim=2)).softmax(dim=1)  # (N, T, 1), sums to 1 over T
        c = (a * h).sum(dim=1, keepdim=True).expand_as(h)  # (N, 1, 2D) -> (N, T, 2D)
        return self.norm(self.project(torch.cat([h, c], dim=2)))  # (N, T, 4D) -> (N, T, D)

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
SEQ_SPACES = {"all": SEQ_OPS}
for _family in ("lstm", "rnn", "lstm_att", "rnn_att"):
    SEQ_SPACES[_family] = ("none", "skip_connect", *(op for op in SEQ_OPS if op[:-2] == _family))
RELAXATIONS = ("softmax", "sample")

class MixedOp(nn.Module):
    """An edge that is not yet decided: every candidate operation, weighted by the softmax of its
    alpha, o_bar(x) = sum_o softmax(alpha)_o * o(x) [D eq. 2]. `ops`: name -> module. `choice`:
    {operation: its weight, a tensor ()} of those to compute; all are `dict(zip(mixed.ops,
    alpha.softmax(-1)))`. A decided edge has one and needs none. ValueError where shapes differ."""
    def __init__(self, ops):
        super().__init__()
        self.ops = nn.ModuleDict(ops)

    def forward(self, x, choice=None):
        if choice is None:
            if len(self.ops) > 1:
                raise ValueError(f"expected a choice, weights for some of {', '.join(self.ops)}")
            (op,) = self.ops.values()
            return op(x)
        (first, weight), *others = choice.items()
        total = weight * self.ops[first](x)
        for name, weight in others:
            y = self.ops[name](x)
            if y.shape != total.shape:
                raise ValueError(f"operations return different shapes: {tuple(total.shape)}, and "
                                 f"{name} {tuple(y.shape)}")
            total.addcmul_(weight, y)  # total += weight * y, a few percent faster
        return total

class Cell(nn.Module):
    """A directed acyclic graph. States 0 and 1 are the outputs of the two cells before, state
    i >= 2 (a node) is the sum of its incoming edges, s_i = sum_{j < i} edge_ji(s_j), and the output
    is the concatenation of the nodes on the axis `concat`. `wiring`: for each node the list of its
    edges (j, names of the candidate operations), many before the search has decided, one after.
    `make(name, j)` builds an operation for an edge from state j, `before` are modules that the
    inputs pass first. A derived cell's state is part of a supernet's, but for norms' scales."""
    def __init__(self, kind, wiring, make, before=(), concat=1):
        super().__init__()
        self.kind, self.wiring, self.concat = kind, wiring, concat
        self.before = nn.ModuleList(before or [nn.Identity(), nn.Identity()])
        self.edges = nn.ModuleDict()
        for i, node in enumerate(wiring, start=2):
            for j, names in node:
                self.edges[f"{j}_{i}"] = MixedOp({name: make(name, j) for name in names})

    def forward(self, s0, s1, choices=None, p_drop=0.0):
        """`choices`: for each edge what `MixedOp` takes, in the order of `wiring`; None if decided.
        `p_drop`: the share of utterances for which a decided edge is dropped in training."""
        states = [self.before[0](s0), self.before[1](s1)]
        dropping = p_drop > 0 and self.training and not choices
        choices = dict(zip(self.edges, choices, strict=True)) if choices else {}
        for i, node in enumerate(self.wiring, start=2):
            arrived = []
            for j, _ in node:
                edge = self.edges[f"{j}_{i}"]
                y = edge(states[j], choices.get(f"{j}_{i}"))
                if dropping and "skip_connect" not in edge.ops:  # which keeps the path alive
                    y = y * F.dropout(y.new_ones(len(y), *[1] * (y.dim() - 1)), p_drop)
                arrived.append(y)
            if any(y.shape != arrived[0].shape for y in arrived):
                shapes = ""
                for (j, names), y in zip(node, arrived):
                    shapes += f"; {', '.join(choices.get(f'{j}_{i}', names))}: {tuple(y.shape)}"
                raise ValueError(f"{self.kind} cell: edges return different shapes{shapes}")
            states.append(sum(arrived[1:], start=arrived[0]))
        return torch.cat(states[2:], dim=self.concat)

class CNNCell(Cell):
    """(N, c0, F0, T0), (N, c1, F, T) -> (N, nodes * c, F, T); of a reduction cell, with stride 2
    from the inputs, (..., ceil(F / 2), ceil(T / 2)). `halve_s0`: s0 is twice as large as s1."""
    def __init__(self, kind, wiring, c0, c1, c, halve_s0, affine):
        def make(name, j):
            stride = 2 if kind == "reduce" and j < 2 else 1
            return CNN_OPS[name](c, stride, affine)
        before_s0 = factorized_reduce if halve_s0 else conv_1x1
        before = before_s0(c0, c, affine), conv_1x1(c1, c, affine)
        super().__init__(kind, wiring, make, before)

class SeqCell(Cell):
    """(N, T, D), (N, T, D) -> (N, T, D). Of nodes * D features `nodes` neighbours are averaged."""
    def __init__(self, wiring, width, affine):
        super().__init__("seq", wiring, lambda name, j: SEQ_OPS[name](width, affine), concat=2)
        self.width = width

    def forward(self, *args, **how):
        return F.adaptive_avg_pool1d(super().forward(*args, **how), self.width)  # nodes * D -> D

@dataclass(frozen=True)
class Genotype:
    """What a search has found: a cell for each kind that the network's depth has, a tuple of nodes.
    A node is a tuple of edges, an edge a pair (operation, predecessor); predecessors 0 and 1 are
    the cell's inputs, 2 its first node. Else ValueError."""
    normal: tuple = None
    reduce: tuple = None
    seq: tuple = None

    def __post_init__(self):
        for kind, cell in self.cells().items():  # lists, as JSON has them, become tuples
            object.__setattr__(self, kind, checked_cell(kind, cell))

    def cells(self):  # {kind: cell} of the cells that are there
        return {kind: cell for kind, cell in vars(self).items() if cell is not None}

    def to_json(self):
        lines = [f'  "{kind}": {json.dumps(cell)}' for kind, cell in self.cells().items()]
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text):
        try:
            return cls(**json.loads(text))
        except (TypeError, RecursionError, json.JSONDecodeError) as error:
            raise ValueError(f"genotype: expected JSON, {{normal, reduce, seq}}: {error}") from None

    def __str__(self):
        lines = []
        for kind, cell in self.cells().items():
            lines.append(f"{kind} cell (0, 1: the outputs of the two cells before)")
            for i, node in enumerate(cell, start=2):
                lines.append(f"  {i} = " + " + ".join(f"{op}({j})" for op, j in node))
        return "\n".join(lines)

def checked_cell(kind, cell):
    """A cell of a genotype as tuples; ValueError for what is none."""
    known, nodes = list(SEQ_OPS if kind == "seq" else CNN_OPS), ()
    with suppress(TypeError, ValueError):
        nodes = tuple(tuple((op, j) for op, j in node) for node in cell)
    if not nodes or not all(nodes):
        raise ValueError(f"genotype, {kind} cell: expected a list of nodes, each a list of edges "
                         f"[operation, predecessor], at least one of each, found {cell!r:.80}")
    for i, node in enumerate(nodes, start=2):
        where, starts = f"genotype, {kind} cell, node {i}: found {node!r:.80}", [j for _, j in node]
        if any(op not in known for op, _ in node):
            raise ValueError(f"{where}; known operations: {', '.join(known)}")
        if any(type(j) is not int or not 0 <= j < i for j in starts) or len({*starts}) < len(node):
            raise ValueError(f"{where}; expected predecessors from 0 to {i - 1}, each once")
    return nodes

class Frames(nn.Module):
    """(N, C, F, T) -> (N, T, D), what the SeqNN reads of each frame: the mean over F, D = C, as in
    the paper; with a `width` all of its C x F features, brought to D = width."""
    def __init__(self, c, f, width=None, dropout=0.3):
        super().__init__()
        self.width, self.project = width, nn.Sequential()
        if width:
            self.project.extend([nn.Linear(c * f, width), nn.LayerNorm(width), nn.Dropout(dropout)])

    def forward(self, x):
        x = x.flatten(1, 2) if self.width else x.mean(dim=2)  # (N, C F, T) or (N, C, T)
        return self.project(x.transpose(1, 2))

def check_sizes(least, **sizes):
    for name, size in sizes.items():
        if size < least:
            raise ValueError(f"{name} is {size}, expected at least {least}")

class Network(nn.Module):
    """Map -> CNN cells, if any -> SeqNN cells -> logits. Without `genotype` the supernet (each edge
    is a mixed operation, and there are alphas), with one the derived network (each edge is the
    operation that was found). The defaults are the paper's scale. ValueError for sizes that cannot
    be, and for a genotype that does not go with them or with `fixed`."""
    def __init__(
        self, *, classes=4, bands=128,  # number of emotions; F of the maps
        channels=8,  # of a cell; each of the (at most two) reduction cells doubles them
        cnn_cells=4,  # reduction cells stand at 1/3 and 2/3; 0: the SeqNN reads the map's columns
        seq_cells=4,  # 0 gives the CNN-only search of 2023
        nodes=4,  # nodes a cell, of the supernet; a genotype brings its own
        stem_stride=1,  # 2 halves the input map before the first cell
        seq_width=None,  # D of the SeqNN, see `Frames`; None, the paper's: the mean over F
        seq_space="all",  # candidate operations of the SeqNN, a key of SEQ_SPACES
        relaxation="softmax",  # or "sample", see `relaxed`
        dropout=0.0,  # after each cell (the authors: 0.3, with which few data are not learnt)
        fixed=None, genotype=None,  # fixed: a Genotype of the cells that a search leaves alone
    ):
        super().__init__()
        check_sizes(1, classes=classes, bands=bands, channels=channels, nodes=nodes,
                    stem_stride=stem_stride, seq_width=seq_width or 1)
        check_sizes(0, cnn_cells=cnn_cells, seq_cells=seq_cells)
        if cnn_cells == 0 and not (seq_cells and seq_width):
            raise ValueError("cnn_cells is 0, which needs seq_cells and a seq_width")
        self.relaxation, self.nodes, self.bands = relaxation, nodes, bands
        self.dropout = nn.Dropout(dropout)
        self.drop_path = 0.0  # `p_drop` of `Cell.forward`; who trains may change it
        kinds = ["normal"] * cnn_cells + ["seq"] * seq_cells
        if cnn_cells:
            kinds[cnn_cells // 3] = kinds[2 * cnn_cells // 3] = "reduce"
        wiring = self.wire(kinds, seq_space, fixed or Genotype(), genotype)
        c, f, affine = channels, math.ceil(bands / stem_stride), genotype is not None
        self.stem, self.cnn = nn.Sequential(), nn.ModuleList()
        older = newer = 1, bands  # C and F of the two outputs before a cell
        if cnn_cells:
            stem = nn.Conv2d(1, 3 * c, 3, stem_stride, padding=1, bias=False)
            self.stem.extend([stem, nn.BatchNorm2d(3 * c)])
            older = newer = 3 * c, f
        for k, kind in enumerate(kinds[:cnn_cells]):
            if kind == "reduce":
                c, f = 2 * c, math.ceil(f / 2)
            nodes, halve_s0 = wiring[kind], k > 0 and kinds[k - 1] == "reduce"
            self.cnn.append(CNNCell(kind, nodes, older[0], newer[0], c, halve_s0, affine))
            older, newer = newer, (len(nodes) * c, f)
        width = seq_width or newer[0]
        read = [older, newer] if seq_cells else [newer]  # without SeqNN cells nobody reads `older`
        self.bridge = nn.ModuleList(Frames(*size, seq_width) for size in read)
        self.seq = nn.ModuleList(SeqCell(wiring["seq"], width, affine) for _ in range(seq_cells))
        self.head = nn.Linear(width, classes)

    def wire(self, kinds, seq_space, fixed, genotype):
        """-> kind -> the wiring of its cells, see `Cell`. Makes alphas for what is not decided."""
        for value, known in ((seq_space, SEQ_SPACES), (self.relaxation, RELAXATIONS)):
            if value not in known:
                raise ValueError(f"found {value!r}, expected one of {', '.join(known)}")
        self.decided = fixed.cells() | (genotype.cells() if genotype else {})  # kind -> cell
        if not fixed.cells().items() <= self.decided.items():
            raise ValueError("the genotype has another cell than the one that is fixed")
        self.candidates = {}  # kind -> names of the operations to choose from
        self.alpha = nn.ParameterDict()  # kind -> (edges, operations), one for all cells of a kind
        wiring = {}
        for kind in ("normal", "reduce", "seq"):
            if kind in self.decided:
                wiring[kind] = [[(j, [op]) for op, j in node] for node in self.decided[kind]]
            elif kind in kinds:
                names = tuple(SEQ_SPACES[seq_space] if kind == "seq" else CNN_OPS)
                wiring[kind] = [[(j, names) for j in range(i)] for i in range(2, self.nodes + 2)]
                start = 1e-3 * torch.randn(sum(map(len, wiring[kind])), len(names))
                self.candidates[kind], self.alpha[kind] = names, nn.Parameter(start)
        if (genotype is not None and self.candidates) or not {*self.decided} <= {*kinds}:
            needs, has = ", ".join(dict.fromkeys(kinds)), ", ".join(self.decided) or "none"
            raise ValueError(f"a genotype of this depth has the cells {needs}; given are: {has}")
        return wiring

    def weights(self):
        """The parameters w of the lower level: all but the alphas."""
        return [p for name, p in self.named_parameters() if not name.startswith("alpha.")]

    def alphas(self):
        """The parameters of the upper level; empty for a derived network."""
        return list(self.alpha.values())

    def forward(self, x):  # (N, 1, F, T) -> logits (N, classes)
        if x.dim() != 4 or x.shape[1:3] != (1, self.bands):
            raise ValueError(f"found {tuple(x.shape)}, expected maps (N, 1, {self.bands}, T)")
        return self.classify(*self.frames(x))

    def relaxed(self, kind):
        """-> for each edge the choice, made continuous, {operation: weight}; None if decided.
        softmax  each operation with its softmax(alpha) [D eq. 2], but `none`, which adds nothing
        sample   in training: one operation is drawn from the softmax and computed alone [G eq. 3,
                 straight-through Gumbel]: k = argmax p of p = softmax(alpha + g), where g is -log
                 of exponential noise. Its weight has the value 1 and the gradient of p_k"""
        if kind not in self.alpha:
            return None
        alpha, names = self.alpha[kind], self.candidates[kind]
        if self.relaxation == "softmax" or not self.training:
            rows = alpha.softmax(dim=-1)
            return [{op: w for op, w in zip(names, row) if op != "none"} for row in rows]
        gumbel = -torch.empty(alpha.shape, device="cpu").exponential_().log()  # for any device
        p = (alpha + gumbel.to(alpha)).softmax(dim=-1)
        drawn = zip(p, p.argmax(dim=-1).tolist())
        return [{names[k]: 1 - row[k].detach() + row[k]} for row, k in drawn]

    def through(self, cells, s0, s1):
        """Runs the cells on the outputs of the two before. -> the outputs of their last two"""
        kinds = dict.fromkeys(cell.kind for cell in cells)  # all cells of a kind choose alike
        choices = {kind: self.relaxed(kind) for kind in kinds}
        for cell in cells:
            s0, s1 = s1, self.dropout(cell(s0, s1, choices[cell.kind], self.drop_path))
        return s0, s1

    def frames(self, x):
        """The CNN half: (N, 1, F, T) -> its last two outputs, as sequences (N, T', D)."""
        x = self.stem(x)  # (N, 3 channels, F, T), if there are CNN cells
        s0, s1 = self.through(self.cnn, x, x)
        s1 = self.bridge[-1](s1)
        s0 = self.bridge[0](s0) if len(self.seq) else s1
        if s0.shape != s1.shape:  # the older may be longer, or at depths other than 4 narrower
            s0 = F.adaptive_avg_pool2d(s0, s1.shape[1:])
        return s0, s1

    def classify(self, s0, s1):
        """The SeqNN half: (N, T, D), (N, T, D) -> logits (N, classes)."""
        _, s1 = self.through(self.seq, s0, s1)
        return self.head(s1.mean(dim=1))  # (N, T, D) -> (N, D) -> (N, classes)

def derive(net):
    """Supernet -> Genotype [D section 2.4], by softmax weights: a raw alpha says nothing about its
    share among the others on its edge. ValueError for alphas that are not finite."""
    if not all(alpha.isfinite().all() for alpha in net.alphas()):
        raise ValueError("the alphas are not finite: no edge is the strongest")
    return strongest(net, {kind: alpha.softmax(dim=-1) for kind, alpha in net.alpha.items()})

def random_genotype(net):
    """The strongest of random scores, uniform over a supernet's space: what to beat."""
    return strongest(net, {k: torch.rand(a.shape, device="cpu") for k, a in net.alpha.items()})

def strongest(net, scores):
    """The strength of an edge is its largest score over the operations other than `none`; each
    node keeps its two strongest edges, each with its strongest operation. -> Genotype"""
    cells = dict(net.decided)
    for kind, names in net.candidates.items():
        kept = [k for k, name in enumerate(names) if name != "none"]
        strength, operation = scores[kind].detach().cpu()[:, kept].max(dim=-1)
        nodes, row = [], 0
        for i in range(2, net.nodes + 2):  # node i: rows of its edges from 0 to i - 1
            pair = strength[row : row + i].topk(2).indices.sort().values.tolist()
            nodes.append([(names[kept[operation[row + j]]], j) for j in pair])
            row += i
        cells[kind] = nodes
    return Genotype(**cells)

def expected_parameters(net):
    """Number of weights on a supernet's edges, each operation counted with its softmax(alpha):
    differentiable, shape (). Part of a loss, it makes networks small."""
    total = 0.0
    for cell in [*net.cnn, *net.seq]:
        if cell.kind in net.alpha:
            weights = net.alpha[cell.kind].softmax(dim=-1)  # (edges, operations)
            for edge, row in zip(cell.edges.values(), weights):
                for op, weight in zip(edge.ops.values(), row):
                    total = total + weight * sum(p.numel() for p in op.parameters())
    return total

def entropy(net):
    """Mean entropy of the edges' softmax weights: 1 undecided, the most there is, 0 decided."""
    weights = [alpha.detach().softmax(dim=-1) for alpha in net.alphas()]
    shares = [torch.special.entr(p).sum(dim=-1) / math.log(p.shape[-1]) for p in weights]
    return torch.cat(shares).mean().item()

class Architect:
    """Moves the alphas of a supernet along the gradient of L_val(w*(alpha), alpha), where w* is
    approximated by one step of plain gradient descent, w' = w - xi * dL_train/dw [D eq. 6-8]:
        dL_val(w')/dalpha - xi * (dL_train(w+)/dalpha - dL_train(w-)/dalpha) / (2 eps)
        w+- = w +- eps * dL_val/dw',     eps = 0.01 / ||dL_val/dw'||
    The quotient stands for d2L_train/(dalpha dw) . dL_val/dw', and does on smooth networks; ReLU
    and max pooling have kinks, and its error there is several times that term.
    order=1 sets xi = 0: one pass over the validation batch, no copy and no gradient of the weights;
    order=2 takes four passes, a copy of the weights and one of their gradient. `loss(logits,
    target)` -> scalar; it may add a function of the alphas, such as `expected_parameters`. Weights
    and BN buffers are bit for bit the same after a step. What does not require a gradient is a
    constant. A torch.autocast block goes around the whole of `step`; it blurs order 2's term."""
    def __init__(self, net, loss, *, order=1, lr=3e-4, betas=(0.5, 0.999), weight_decay=1e-3):
        if order not in (1, 2):
            raise ValueError(f"order is {order!r}, expected 1 or 2")
        if not net.alphas():
            raise ValueError("the network has no alphas: expected a supernet with cells to search")
        if order == 2 and net.relaxation == "sample":
            raise ValueError("order 2 goes with softmax: each pass would draw anew")
        self.net, self.loss, self.order = net, loss, order
        self.weights = net.weights()
        self.optimizer = torch.optim.Adam(net.alphas(), lr, betas, weight_decay=weight_decay)

    def step(self, val, train=None, xi=None):
        """Moves the alphas once; returns L_val (of w, or of w' when order=2), a float. `val` is a
        batch (x, target) of the alphas' half of the training data; order 2 also needs `train`, the
        batch of the coming weight step, and `xi`, its learning rate. ValueError, before anything
        has moved, for a loss or gradient that is not finite."""
        if {*map(id, self.net.alphas())} != {*map(id, self.optimizer.param_groups[0]["params"])}:
            raise ValueError("the network has other alphas now: expected a new Architect")
        alphas = [alpha for alpha in self.net.alphas() if alpha.requires_grad]
        if any(alpha.dtype.itemsize < 4 for alpha in alphas):  # Adam's eps is 0 in float16
            raise ValueError("alphas in half precision: net.alpha.float() after net.half()")
        if self.order == 2 and (train is None or xi is None):
            raise ValueError("order 2 needs `train`, the batch of the coming weight step, and `xi`")
        if self.order == 2:
            loss, gradients = self.second_order(alphas, val, train, xi)
        else:  # dL_val(w, alpha)/dalpha
            with without_statistics(self.net), held_fixed(self.weights):
                loss, gradients = self.gradient(val, alphas)
        if not all(found.isfinite().all() for found in (loss, *gradients)):
            raise ValueError(f"the alphas' loss, {loss.item():.3g}, or its gradient is not finite")
        self.optimizer.zero_grad()  # of the caller's weight step
        for alpha, gradient in zip(alphas, gradients):
            alpha.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def second_order(self, alphas, val, train, xi):
        """[D eq. 7], with the finite difference of [D eq. 8]. -> L_val(w'), gradients."""
        w = [p for p in self.weights if p.requires_grad]
        w_before = [p.detach().clone() for p in w]
        # One function of (w, alpha) in all passes over the training batch: fresh dropout masks
        # would make a difference of their own, blown up by 1 / (2 eps).
        masks = int(torch.randint(2**62, ()))
        with without_statistics(self.net):
            try:
                set_to(w, w_before, self.gradient(train, w, masks)[1], -xi)  # w'
                loss, both = self.gradient(val, alphas + w)
                d_alpha, d_w = both[: len(alphas)], both[len(alphas) :]
                eps = 0.01 / max(torch.nn.utils.get_total_norm(d_w).item(), 1e-12)
                set_to(w, w_before, d_w, eps)  # w+
                _, plus = self.gradient(train, alphas, masks)
                set_to(w, w_before, d_w, -eps)  # w-
                _, minus = self.gradient(train, alphas, masks)
            finally:
                set_to(w, w_before)
        return loss, [d - xi * (p - m) / (2 * eps) for d, p, m in zip(d_alpha, plus, minus)]

    def gradient(self, batch, parameters, masks=None):
        """-> a loss and its gradients, 0 for what a drawn `none` cuts off. `masks`: their seed."""
        x, target = batch
        with torch.random.fork_rng([x.device] if x.is_cuda else [], enabled=masks is not None):
            if masks is not None:
                torch.manual_seed(masks)
            loss = self.loss(self.net(x), target)
        if not parameters:
            return loss.detach(), ()
        return loss.detach(), torch.autograd.grad(loss, parameters, materialize_grads=True)

@torch.no_grad()
def set_to(w, base, direction=None, step=0.0):
    """w := base + step * direction, in place, parameter by parameter."""
    for k, p in enumerate(w):
        p.copy_(base[k] if direction is None else base[k] + step * direction[k])
    torch.clear_autocast_cache()  # or a caller's autocast would go on with the weights before

def held_fixed(parameters):
    """Inside, these are constants: autograd keeps nothing on their behalf."""
    return switched_off("requires_grad", parameters)

def without_statistics(net):
    """Inside, batch norm in training mode normalises by the batch as always, but counts nothing."""
    return switched_off("track_running_stats", [m for m in net.modules() if m.training])

@contextmanager
def switched_off(flag, objects):
    """Inside, `flag` is False where it was True."""
    changed = [each for each in objects if getattr(each, flag, False)]
    for each in changed:
        setattr(each, flag, False)
    try:
        yield
    finally:
        for each in changed:
            setattr(each, flag, True)
