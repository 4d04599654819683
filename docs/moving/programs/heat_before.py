"""Data parallel training with Heat: mpirun -n 2 python heat_before.py"""

# launch
import heat as ht
import torch

comm = ht.MPI_WORLD

# data
gen = torch.Generator().manual_seed(1)
x = torch.randn(24, 6, generator=gen)
y = x.square().sum(1, keepdim=True)
size = 24 // comm.size
mine = slice(
    comm.rank * size, (comm.rank + 1) * size
)
data = torch.utils.data.TensorDataset(
    x[mine], y[mine]
)
loader = torch.utils.data.DataLoader(
    data, 4
)

# model
model = torch.nn.Sequential(
    torch.nn.Linear(6, 16),
    torch.nn.Tanh(),
    torch.nn.Linear(16, 1),
)
adam = torch.optim.Adam(
    model.parameters(), lr=0.01
)
optimizer = ht.optim.DataParallelOptimizer(
    adam, False
)
net = ht.nn.DataParallel(
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
sums = comm.handle.allreduce(sums)
if comm.rank == 0:
    print(f"mean {sums[0] / sums[1]:.5f}")

# save
if comm.rank == 0:
    torch.save(
        model.state_dict(), "model.pt"
    )
comm.Barrier()
model.load_state_dict(
    torch.load("model.pt")
)

# end
