"""
Handwritten digits with three rare classes
==========================================

A small network learns scikit-learn's handwritten digits. Three of the ten classes have few training images: 8, 6 and 4. The
network often takes these digits for others. :func:`alphaext.repair_model` repairs their rows of the last layer.
"""

# %%
# Make the training data long-tailed. Validation has 20 images of each class, and test has 40.
import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import alphaext

images, labels = load_digits(return_X_y=True)
images = (images / 16).astype(np.float32)
counts = (110, 105, 102, 80, 60, 45, 30, 8, 6, 4)
random = np.random.default_rng(0)
parts: dict[str, list[int]] = {"train": [], "val": [], "test": []}
for count, digit in zip(counts, random.permutation(10), strict=True):
    order = random.permutation(np.flatnonzero(labels == digit))
    for part, chosen in zip(parts, (order[60 : 60 + count], order[40:60], order[:40]), strict=True):
        parts[part].extend(chosen)
train, val, test = ((images[rows], labels[rows]) for rows in parts.values())

# %%
# Train a network in the plain way.
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
inputs, targets = torch.from_numpy(train[0]), torch.from_numpy(train[1])
for _ in range(40):
    for batch in torch.randperm(len(targets)).split(64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[batch]), targets[batch]).backward()
        optimizer.step()

# %%
# Repair it. Whatever is chosen is chosen on the validation images.
made = alphaext.repair_model(model, train, val, progress=False)
print(made)

# %%
# Measure both on the test images, which nothing was chosen on.
split = made.repair.split
rare = split.few.tolist()


def accuracy_by_class(network: nn.Module) -> np.ndarray:
    """The share of each class's test images that the network recognises."""
    with torch.no_grad():
        hits = network(torch.from_numpy(test[0])).argmax(1).numpy() == test[1]
    return np.array([100 * hits[test[1] == digit].mean() for digit in range(10)])


before, after = accuracy_by_class(model), accuracy_by_class(made.model)
for name, classes in (("few", rare), ("base", [digit for digit in range(10) if digit not in rare]), ("all", range(10))):
    print(f"{name:4} {before[list(classes)].mean():.1f}% -> {after[list(classes)].mean():.1f}%")

# %%
# The picture: rare classes are on the left.
order = [*rare, *(digit for digit in range(10) if digit not in rare)]
figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
places = np.arange(10)
axes.bar(places - 0.2, before[order], 0.4, label="before")
axes.bar(places + 0.2, after[order], 0.4, label="after")
axes.axvline(len(rare) - 0.5, color="gray", linestyle=":")
axes.set_xticks(places, order)
axes.set(xlabel="digit", ylabel="recognised, % of test images", ylim=(0, 100))
figure.legend(loc="outside upper right", ncols=2)
