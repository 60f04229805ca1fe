"""Peers are timed on the same random draws: stochastic depth drops the same blocks of each."""

import torch
from torch import nn

from resnet_fused.bench.options import Options
from resnet_fused.bench.run import Bench


class Drawing(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.drawn = nn.Linear(4, 10), []

    def forward(self, x):
        self.drawn.append(torch.rand(()).item())
        return self.fc(x)


def test_steps_of_all_peers_draw_the_same():
    bench = Bench(Options(), None, torch.device("cpu"), {}, None, None)
    peers = [Drawing() for _ in range(2)]
    steps = [bench.step(peer, torch.randn(2, 4)) for peer in peers]
    for run in (steps[0], steps[1], steps[1], steps[0]):
        run(lambda lap: None)
    assert peers[0].drawn == peers[1].drawn and len(set(peers[0].drawn)) == 2
