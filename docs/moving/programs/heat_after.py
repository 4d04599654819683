"""The same with distdl_lite: mpirun -n 2 python heat_after.py"""

# launch
import torch

import distdl_lite as dl

dl.abort_on_exception()
comm = dl.Partition.world()

# data
gen = torch.Generator().manual_seed(1)
x = torch.randn(24, 6, generator=gen)
y = x.square().sum(1, keepdim=True)
data = torch.utils.data.TensorDataset(x, y)
loader = dl.data.Loader(
    data,
    comm,
    shuffle=False,
    global_batch_size=8,
)

# model
torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Linear(6, 16),
    torch.nn.Tanh(),
    torch.nn.Linear(16, 1),
)
adam = torch.optim.Adam(
    model.parameters(), lr=0.01
)
optimizer = dl.DataParallelOptimizer(
    adam, False
)
net = dl.DataParallel(
    model, comm, optimizer, False
)

# step
for _epoch in range(10):
    for x, y in loader:
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(
            net(x), y
        )
        loss.backward()
        optimizer.step()

# evaluate
net.eval()
sums = torch.zeros(2)
with torch.no_grad():
    for x, y in loader:
        sums[0] += (
            (net(x) - y).square().sum()
        )
        sums[1] += len(y)
sums = comm.allreduce_data(sums, torch.add)
comm.print(f"mean {sums[0] / sums[1]:.5f}")

# save
net.synchronize()
dl.save(
    "runs/epoch_10",
    model=model,
    optimizer=adam,
)
dl.load(
    "runs/epoch_10",
    model=model,
    optimizer=adam,
)

# end
