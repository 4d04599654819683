"""Several ranks behind one script with distdl_lite: mpirun -n 2 python torch_data_parallel_after.py"""

# launch
import torch
from torch import nn

import distdl_lite as dl


def main(net, model):
    # data
    gen = torch.Generator().manual_seed(1)
    x = torch.randn(7, 3, generator=gen)
    y = x.square().sum(1, keepdim=True)

    # optimizer
    adam = torch.optim.Adam(
        net.parameters(), lr=0.01
    )

    # step
    for _ in range(20):
        adam.zero_grad()
        loss = nn.functional.mse_loss(
            net(x), y
        )
        loss.backward()
        nn.utils.clip_grad_norm_(
            net.parameters(), 1
        )
        adam.step()

    # evaluate
    with torch.no_grad():
        loss = nn.functional.mse_loss(
            net(x), y
        )
    print(f"mean {loss:.5f}")

    # save
    torch.save(
        model.state_dict(), "model.pt"
    )
    model.load_state_dict(
        torch.load("model.pt")
    )


# model
dl.abort_on_exception()
torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(3, 16),
    nn.Tanh(),
    nn.Linear(16, 1),
)
net = dl.RootDataParallel(model)
with net.serve() as at_root:
    if at_root:
        main(net, model)

# end
