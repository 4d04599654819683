"""Several GPUs in one process with torch: python torch_data_parallel_before.py"""

# launch
import torch
from torch import nn

device = (
    "cuda"
    if torch.cuda.is_available()
    else "cpu"
)

# data
gen = torch.Generator().manual_seed(1)
x = torch.randn(7, 3, generator=gen).to(
    device
)
y = x.square().sum(1, keepdim=True)

# model
torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(3, 16),
    nn.Tanh(),
    nn.Linear(16, 1),
)
net = nn.DataParallel(model.to(device))
adam = torch.optim.Adam(
    net.parameters(), lr=0.01
)

# step
for _ in range(20):
    adam.zero_grad()
    loss = nn.functional.mse_loss(net(x), y)
    loss.backward()
    nn.utils.clip_grad_norm_(
        net.parameters(), 1
    )
    adam.step()

# evaluate
with torch.no_grad():
    loss = nn.functional.mse_loss(net(x), y)
print(f"mean {loss:.5f}")

# save
torch.save(model.state_dict(), "model.pt")
model.load_state_dict(
    torch.load("model.pt")
)

# end
