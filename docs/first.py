import torch
from torch import nn

import distdl_lite as dl

dl.abort_on_exception()  # an error on one rank ends the job
torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 8, 3, padding=1),
    nn.BatchNorm2d(8),
    nn.SiLU(),
    nn.Conv2d(8, 1, 3, padding=1),
)
P = dl.Partition.world().grid(h=2, w=2, of="n c h w")  # height and width in two
net = dl.distribute(model, P)  # the same weights, under the same names
measure = dl.distribute(nn.MSELoss(), P)  # a plain loss would be of this block alone
optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)

image = torch.rand(4, 1, 65, 97)
x, target = P.cut(image), P.cut(torch.zeros_like(image))  # this rank's blocks
for step in range(3):
    loss = measure(net(x), target)
    optimizer.zero_grad()
    loss.backward()  # .grad is final: nothing else to call
    optimizer.step()
    P.print(f"step {step}: loss {loss.item():.5f}")
